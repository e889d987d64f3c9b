// passes: reroll
// A step's attention may not look ahead.
builtin.module {
  tb.step attributes {vocab = 4, context = 8} {
  ^bb0(%token: index, %position: index):
    %x = tb.embedding(%token) {weight = @wte, offset = 0} : (index) -> tensor<4xf32>
    %y = tb.attention(%x, %x, %x) {heads = 2, kv_heads = 2, head_dim = 2, scale = 1.0 : f32, mask = "none"} : (tensor<4xf32>, tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    tb.return(%y) : tensor<4xf32>
  }
}
// -----
// error: attention in tb.step needs a causal or window mask
