// passes: reroll
// Layers that alternate loop in pairs; {2:0} is twice the number of the pair, {2:1} one more.
builtin.module {
  tb.step attributes {vocab = 4, context = 8} {
  ^bb0(%token: index, %position: index):
    %x0 = tb.embedding(%token) {weight = @wte, offset = 0} : (index) -> tensor<4xf32>
    %r0 = tb.rotary(%x0, %position) {heads = 2, head_dim = 2, rotary_dim = 2, pairing = "half", cos = @cos, sin = @sin} : (tensor<4xf32>, index) -> tensor<4xf32>
    %a0 = tb.attention(%r0, %r0, %x0) {heads = 2, kv_heads = 2, head_dim = 2, scale = 0.5 : f32, mask = "causal"} : (tensor<4xf32>, tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %x1 = tb.linear(%a0) {weight = @"pair(h.0.w,h.0.v)", layout = "in_out"} : (tensor<4xf32>) -> tensor<4xf32>
    %r1 = tb.rotary(%x1, %position) {heads = 2, head_dim = 2, rotary_dim = 2, pairing = "half", cos = @cos, sin = @sin} : (tensor<4xf32>, index) -> tensor<4xf32>
    %a1 = tb.attention(%r1, %r1, %x1) {heads = 2, kv_heads = 2, head_dim = 2, scale = 0.5 : f32, mask = "window", window = 3} : (tensor<4xf32>, tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %x2 = tb.linear(%a1) {weight = @"pair(h.1.w,h.1.v)", layout = "in_out"} : (tensor<4xf32>) -> tensor<4xf32>
    %r2 = tb.rotary(%x2, %position) {heads = 2, head_dim = 2, rotary_dim = 2, pairing = "half", cos = @cos, sin = @sin} : (tensor<4xf32>, index) -> tensor<4xf32>
    %a2 = tb.attention(%r2, %r2, %x2) {heads = 2, kv_heads = 2, head_dim = 2, scale = 0.5 : f32, mask = "causal"} : (tensor<4xf32>, tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %x3 = tb.linear(%a2) {weight = @"pair(h.2.w,h.2.v)", layout = "in_out"} : (tensor<4xf32>) -> tensor<4xf32>
    %r3 = tb.rotary(%x3, %position) {heads = 2, head_dim = 2, rotary_dim = 2, pairing = "half", cos = @cos, sin = @sin} : (tensor<4xf32>, index) -> tensor<4xf32>
    %a3 = tb.attention(%r3, %r3, %x3) {heads = 2, kv_heads = 2, head_dim = 2, scale = 0.5 : f32, mask = "window", window = 3} : (tensor<4xf32>, tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %x4 = tb.linear(%a3) {weight = @"pair(h.3.w,h.3.v)", layout = "in_out"} : (tensor<4xf32>) -> tensor<4xf32>
    tb.return(%x4) : tensor<4xf32>
  }
}
// -----
builtin.module {
  tb.step attributes {vocab = 4, context = 8} {
  ^bb0(%token: index, %position: index):
    %x = tb.embedding(%token) {weight = @wte, offset = 0} : (index) -> tensor<4xf32>
    %out = tb.repeat(%x) attributes {count = 2, start = 0} {
    ^bb1(%x0: tensor<4xf32>):
      %r0 = tb.rotary(%x0, %position) {heads = 2, head_dim = 2, rotary_dim = 2, pairing = "half", cos = @cos, sin = @sin} : (tensor<4xf32>, index) -> tensor<4xf32>
      %a0 = tb.attention(%r0, %r0, %x0) {heads = 2, kv_heads = 2, head_dim = 2, scale = 0.5 : f32, mask = "causal"} : (tensor<4xf32>, tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
      %x1 = tb.linear(%a0) {weight = @"pair(h.{2:0}.w,h.{2:0}.v)", layout = "in_out"} : (tensor<4xf32>) -> tensor<4xf32>
      %r1 = tb.rotary(%x1, %position) {heads = 2, head_dim = 2, rotary_dim = 2, pairing = "half", cos = @cos, sin = @sin} : (tensor<4xf32>, index) -> tensor<4xf32>
      %a1 = tb.attention(%r1, %r1, %x1) {heads = 2, kv_heads = 2, head_dim = 2, scale = 0.5 : f32, mask = "window", window = 3} : (tensor<4xf32>, tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
      %x2 = tb.linear(%a1) {weight = @"pair(h.{2:1}.w,h.{2:1}.v)", layout = "in_out"} : (tensor<4xf32>) -> tensor<4xf32>
      tb.yield(%x2) : tensor<4xf32>
    } : (tensor<4xf32>) -> tensor<4xf32>
    tb.return(%out) : tensor<4xf32>
  }
}
