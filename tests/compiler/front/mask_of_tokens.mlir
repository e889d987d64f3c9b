// passes: classify-masks
// A mask that depends on the tokens is refused.
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%q: tensor<1x2x?x2xf32>):
    %n = tb.aten(%q) {target = "aten.sym_size.int", args = ["%0", 2]} : (tensor<1x2x?x2xf32>) -> index
    %i = tb.aten(%n) {target = "aten.arange.default", args = ["%0"]} : (index) -> tensor<?xi64>
    %row = tb.aten(%i) {target = "aten.unsqueeze.default", args = ["%0", 1]} : (tensor<?xi64>) -> tensor<?x1xi64>
    %away = tb.aten(%row, %i) {target = "aten.sub.Tensor", args = ["%0", "%1"]} : (tensor<?x1xi64>, tensor<?xi64>) -> tensor<?x?xi64>
    %first = tb.aten(%q) {target = "aten.select.int", args = ["%0", 1, 0]} : (tensor<1x2x?x2xf32>) -> tensor<1x?x2xf32>
    %sum = tb.aten(%first) {target = "aten.sum.dim_IntList", args = ["%0", [0, 2]]} : (tensor<1x?x2xf32>) -> tensor<?xf32>
    %m = tb.aten(%away, %sum) {target = "aten.ge.Tensor", args = ["%0", "%1"]} : (tensor<?x?xi64>, tensor<?xf32>) -> tensor<?x?xi1>
    %a = tb.attention(%q, %q, %q, %m) {node = "sdpa", heads = 2, kv_heads = 2, head_dim = 2, scale = 0.5 : f32} : (tensor<1x2x?x2xf32>, tensor<1x2x?x2xf32>, tensor<1x2x?x2xf32>, tensor<?x?xi1>) -> tensor<1x2x?x2xf32>
    tb.return(%a) : tensor<1x2x?x2xf32>
  }
}
// -----
// error: sdpa: its mask cannot be worked out: it depends on the values of the tokens
