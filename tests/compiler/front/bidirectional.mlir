// passes: make-incremental
// Attention to later positions cannot be computed token by token.
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%ids: tensor<1x?xi64>):
    %x = tb.embedding(%ids) {weight = @wte, offset = 0} : (tensor<1x?xi64>) -> tensor<1x?x4xf32>
    %h = tb.aten(%x) {target = "aten.view.default", args = ["%0", [1, -1, 2, 2]]} : (tensor<1x?x4xf32>) -> tensor<1x?x2x2xf32>
    %q = tb.aten(%h) {target = "aten.transpose.int", args = ["%0", 1, 2]} : (tensor<1x?x2x2xf32>) -> tensor<1x2x?x2xf32>
    %a = tb.attention(%q, %q, %q) {node = "sdpa", heads = 2, kv_heads = 2, head_dim = 2, scale = 0.5 : f32, mask = "none"} : (tensor<1x2x?x2xf32>, tensor<1x2x?x2xf32>, tensor<1x2x?x2xf32>) -> tensor<1x2x?x2xf32>
    %b = tb.aten(%a) {target = "aten.transpose.int", args = ["%0", 1, 2]} : (tensor<1x2x?x2xf32>) -> tensor<1x?x2x2xf32>
    %c = tb.aten(%b) {target = "aten.reshape.default", args = ["%0", [1, -1, 4]]} : (tensor<1x?x2x2xf32>) -> tensor<1x?x4xf32>
    tb.return(%c) : tensor<1x?x4xf32>
  }
}
// -----
// error: sdpa: each position attends to later ones; use a causal mask
