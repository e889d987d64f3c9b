// passes: classify-masks
// What is not on the list of operations is never run.
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%q: tensor<1x2x?x2xf32>):
    %n = tb.aten(%q) {target = "aten.sym_size.int", args = ["%0", 2]} : (tensor<1x2x?x2xf32>) -> index
    %i = tb.aten(%n) {target = "aten.arange.default", args = ["%0"]} : (index) -> tensor<?xi64>
    %row = tb.aten(%i) {target = "aten.unsqueeze.default", args = ["%0", 1]} : (tensor<?xi64>) -> tensor<?x1xi64>
    %away = tb.aten(%row, %i) {target = "aten.sub.Tensor", args = ["%0", "%1"]} : (tensor<?x1xi64>, tensor<?xi64>) -> tensor<?x?xi64>
    %m = tb.aten(%n) {target = "aten.rand.default", args = [["%0", "%0"]]} : (index) -> tensor<?x?xf32>
    %a = tb.attention(%q, %q, %q, %m) {node = "sdpa", heads = 2, kv_heads = 2, head_dim = 2, scale = 0.5 : f32} : (tensor<1x2x?x2xf32>, tensor<1x2x?x2xf32>, tensor<1x2x?x2xf32>, tensor<?x?xf32>) -> tensor<1x2x?x2xf32>
    tb.return(%a) : tensor<1x2x?x2xf32>
  }
}
// -----
// error: sdpa: its mask cannot be worked out: aten.rand.default is not among the operations
