// passes: make-incremental
// Views that keep each token's elements in order vanish; a fused q, k, v, packed as three blocks of heads, becomes slices.
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%ids: tensor<1x?xi64>):
    %flat = tb.aten(%ids) {target = "aten.view.default", args = ["%0", [-1]]} : (tensor<1x?xi64>) -> tensor<?xi64>
    %tok = tb.embedding(%flat) {weight = @wte, offset = 0} : (tensor<?xi64>) -> tensor<?x12xf32>
    %p = tb.positions : tensor<?xi64>
    %pos = tb.embedding(%p) {weight = @wpe, offset = 2} : (tensor<?xi64>) -> tensor<?x12xf32>
    %x = tb.add(%tok, %pos) : (tensor<?x12xf32>, tensor<?x12xf32>) -> tensor<?x12xf32>
    %v = tb.aten(%x) {target = "aten.view.default", args = ["%0", [1, -1, 3, 2, 2]]} : (tensor<?x12xf32>) -> tensor<1x?x3x2x2xf32>
    %t = tb.aten(%v) {target = "aten.permute.default", args = ["%0", [2, 0, 3, 1, 4]]} : (tensor<1x?x3x2x2xf32>) -> tensor<3x1x2x?x2xf32>
    %q, %k, %w = tb.aten(%t) {target = "aten.unbind.int", args = ["%0"]} : (tensor<3x1x2x?x2xf32>) -> (tensor<1x2x?x2xf32>, tensor<1x2x?x2xf32>, tensor<1x2x?x2xf32>)
    %a = tb.attention(%q, %k, %w) {heads = 2, kv_heads = 2, head_dim = 2, scale = 0.5 : f32, mask = "causal"} : (tensor<1x2x?x2xf32>, tensor<1x2x?x2xf32>, tensor<1x2x?x2xf32>) -> tensor<1x2x?x2xf32>
    %b = tb.aten(%a) {target = "aten.transpose.int", args = ["%0", 1, 2]} : (tensor<1x2x?x2xf32>) -> tensor<1x?x2x2xf32>
    %c = tb.aten(%b) {target = "aten.reshape.default", args = ["%0", [1, -1, 4]]} : (tensor<1x?x2x2xf32>) -> tensor<1x?x4xf32>
    %l = tb.linear(%c) {weight = @head, layout = "out_in"} : (tensor<1x?x4xf32>) -> tensor<1x?x7xf32>
    tb.return(%l) : tensor<1x?x7xf32>
  }
}
// -----
builtin.module {
  tb.step attributes {vocab = 7, context = 8} {
  ^bb0(%token: index, %position: index):
    %tok = tb.embedding(%token) {weight = @wte, offset = 0} : (index) -> tensor<12xf32>
    %pos = tb.embedding(%position) {weight = @wpe, offset = 2} : (index) -> tensor<12xf32>
    %x = tb.add(%tok, %pos) : (tensor<12xf32>, tensor<12xf32>) -> tensor<12xf32>
    %q = tb.slice(%x) {start = 0, size = 4} : (tensor<12xf32>) -> tensor<4xf32>
    %k = tb.slice(%x) {start = 4, size = 4} : (tensor<12xf32>) -> tensor<4xf32>
    %w = tb.slice(%x) {start = 8, size = 4} : (tensor<12xf32>) -> tensor<4xf32>
    %a = tb.attention(%q, %k, %w) {heads = 2, kv_heads = 2, head_dim = 2, scale = 0.5 : f32, mask = "causal"} : (tensor<4xf32>, tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %l = tb.linear(%a) {weight = @head, layout = "out_in"} : (tensor<4xf32>) -> tensor<7xf32>
    tb.return(%l) : tensor<7xf32>
  }
}
