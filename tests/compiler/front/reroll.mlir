// passes: reroll
// Layers 2, 3 and 4 differ in their weights' number only; the embedding that all of them use is carried unchanged.
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
    %n1 = tb.layer_norm(%x1) {weight = @"h.3.norm", eps = 1.0e-5 : f32} : (tensor<4xf32>) -> tensor<4xf32>
    %a1 = tb.attention(%n1, %n1, %n1) {heads = 2, kv_heads = 2, head_dim = 2, scale = 0.5 : f32, mask = "causal"} : (tensor<4xf32>, tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %l1 = tb.linear(%a1) {weight = @"h.3.w1", bias = @"h.3.b1", layout = "in_out"} : (tensor<4xf32>) -> tensor<4xf32>
    %g1 = tb.mul(%l1, %e) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %x2 = tb.add(%x1, %g1) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %n2 = tb.layer_norm(%x2) {weight = @"h.4.norm", eps = 1.0e-5 : f32} : (tensor<4xf32>) -> tensor<4xf32>
    %a2 = tb.attention(%n2, %n2, %n2) {heads = 2, kv_heads = 2, head_dim = 2, scale = 0.5 : f32, mask = "causal"} : (tensor<4xf32>, tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %l2 = tb.linear(%a2) {weight = @"h.4.w1", bias = @"h.4.b1", layout = "in_out"} : (tensor<4xf32>) -> tensor<4xf32>
    %g2 = tb.mul(%l2, %e) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %x3 = tb.add(%x2, %g2) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    tb.return(%x3) : tensor<4xf32>
  }
}
// -----
builtin.module {
  tb.step attributes {vocab = 4, context = 8} {
  ^bb0(%token: index, %position: index):
    %e = tb.embedding(%token) {weight = @wte, offset = 0} : (index) -> tensor<4xf32>
    %x0 = tb.embedding(%position) {weight = @wpe, offset = 0} : (index) -> tensor<4xf32>
    %x3, %e3 = tb.repeat(%x0, %e) attributes {count = 3, start = 2} {
    ^bb1(%x: tensor<4xf32>, %f: tensor<4xf32>):
      %n = tb.layer_norm(%x) {weight = @"h.{}.norm", eps = 1.0e-5 : f32} : (tensor<4xf32>) -> tensor<4xf32>
      %a = tb.attention(%n, %n, %n) {heads = 2, kv_heads = 2, head_dim = 2, scale = 0.5 : f32, mask = "causal"} : (tensor<4xf32>, tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
      %l = tb.linear(%a) {weight = @"h.{}.w1", bias = @"h.{}.b1", layout = "in_out"} : (tensor<4xf32>) -> tensor<4xf32>
      %g = tb.mul(%l, %f) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
      %y = tb.add(%x, %g) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
      tb.yield(%y, %f) : tensor<4xf32>, tensor<4xf32>
    } : (tensor<4xf32>, tensor<4xf32>) -> (tensor<4xf32>, tensor<4xf32>)
    tb.return(%x3) : tensor<4xf32>
  }
}
