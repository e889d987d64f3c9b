// passes: reroll
// Layers whose numbers go down stay as they are.
builtin.module {
  tb.step attributes {vocab = 4, context = 8} {
  ^bb0(%token: index, %position: index):
    %e = tb.embedding(%token) {weight = @wte, offset = 0} : (index) -> tensor<4xf32>
    %x0 = tb.embedding(%position) {weight = @wpe, offset = 0} : (index) -> tensor<4xf32>
    %n0 = tb.layer_norm(%x0) {weight = @"h.2.norm", eps = 1.0e-5 : f32} : (tensor<4xf32>) -> tensor<4xf32>
    %a0 = tb.attention(%n0, %n0, %n0) {heads = 2, kv_heads = 2, head_dim = 2, scale = 0.5 : f32, mask = "causal"} : (tensor<4xf32>, tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %l0 = tb.linear(%a0) {weight = @"h.2.w1", bias = @"h.2.b1", layout = "in_out"} : (tensor<4xf32>) -> tensor<4xf32>
    %g0 = tb.mul(%l0, %e) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %x1 = tb.add(%x0, %g0) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %n1 = tb.layer_norm(%x1) {weight = @"h.0.norm", eps = 1.0e-5 : f32} : (tensor<4xf32>) -> tensor<4xf32>
    %a1 = tb.attention(%n1, %n1, %n1) {heads = 2, kv_heads = 2, head_dim = 2, scale = 0.5 : f32, mask = "causal"} : (tensor<4xf32>, tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %l1 = tb.linear(%a1) {weight = @"h.0.w1", bias = @"h.0.b1", layout = "in_out"} : (tensor<4xf32>) -> tensor<4xf32>
    %g1 = tb.mul(%l1, %e) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %x2 = tb.add(%x1, %g1) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    tb.return(%x2) : tensor<4xf32>
  }
}
// -----
builtin.module {
  tb.step attributes {vocab = 4, context = 8} {
  ^bb0(%token: index, %position: index):
    %e = tb.embedding(%token) {weight = @wte, offset = 0} : (index) -> tensor<4xf32>
    %x0 = tb.embedding(%position) {weight = @wpe, offset = 0} : (index) -> tensor<4xf32>
    %n0 = tb.layer_norm(%x0) {weight = @"h.2.norm", eps = 1.0e-5 : f32} : (tensor<4xf32>) -> tensor<4xf32>
    %a0 = tb.attention(%n0, %n0, %n0) {heads = 2, kv_heads = 2, head_dim = 2, scale = 0.5 : f32, mask = "causal"} : (tensor<4xf32>, tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %l0 = tb.linear(%a0) {weight = @"h.2.w1", bias = @"h.2.b1", layout = "in_out"} : (tensor<4xf32>) -> tensor<4xf32>
    %g0 = tb.mul(%l0, %e) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %x1 = tb.add(%x0, %g0) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %n1 = tb.layer_norm(%x1) {weight = @"h.0.norm", eps = 1.0e-5 : f32} : (tensor<4xf32>) -> tensor<4xf32>
    %a1 = tb.attention(%n1, %n1, %n1) {heads = 2, kv_heads = 2, head_dim = 2, scale = 0.5 : f32, mask = "causal"} : (tensor<4xf32>, tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %l1 = tb.linear(%a1) {weight = @"h.0.w1", bias = @"h.0.b1", layout = "in_out"} : (tensor<4xf32>) -> tensor<4xf32>
    %g1 = tb.mul(%l1, %e) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %x2 = tb.add(%x1, %g1) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    tb.return(%x2) : tensor<4xf32>
  }
}
