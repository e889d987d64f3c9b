// passes: classify-masks
// A bias over all pairs of positions, later ones too, is none for a decoder.
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%q: tensor<1x2x?x2xf32>):
    %n = tb.aten(%q) {target = "aten.sym_size.int", args = ["%0", 2]} : (tensor<1x2x?x2xf32>) -> index
    %i = tb.aten(%n) {target = "aten.arange.default", args = ["%0"]} : (index) -> tensor<?xi64>
    %row = tb.aten(%i) {target = "aten.unsqueeze.default", args = ["%0", 1]} : (tensor<?xi64>) -> tensor<?x1xi64>
    %away = tb.aten(%row, %i) {target = "aten.sub.Tensor", args = ["%0", "%1"]} : (tensor<?x1xi64>, tensor<?xi64>) -> tensor<?x?xi64>
    %far = tb.aten(%away) {target = "aten.neg.default", args = ["%0"]} : (tensor<?x?xi64>) -> tensor<?x?xi64>
    %m = tb.aten(%far) {target = "aten.to.dtype", args = ["%0", "torch.float32"]} : (tensor<?x?xi64>) -> tensor<?x?xf32>
    %a = tb.attention(%q, %q, %q, %m) {node = "sdpa", heads = 2, kv_heads = 2, head_dim = 2, scale = 0.5 : f32} : (tensor<1x2x?x2xf32>, tensor<1x2x?x2xf32>, tensor<1x2x?x2xf32>, tensor<?x?xf32>) -> tensor<1x2x?x2xf32>
    tb.return(%a) : tensor<1x2x?x2xf32>
  }
}
// -----
// error: sdpa: its mask is neither causal nor a sliding window: position 0 attends to 1, and each position to all later ones
