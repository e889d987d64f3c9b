// passes: reroll
// K/V heads that do not divide the heads.
builtin.module {
  tb.step attributes {vocab = 4, context = 8} {
  ^bb0(%token: index, %position: index):
    %x = tb.embedding(%token) {weight = @wte, offset = 0} : (index) -> tensor<4xf32>
    %y = tb.attention(%x, %x, %x) {heads = 4, kv_heads = 3, head_dim = 1, scale = 1.0 : f32, mask = "causal"} : (tensor<4xf32>, tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    tb.return(%y) : tensor<4xf32>
  }
}
// -----
// error: kv_heads = 3 must divide heads = 4
