// passes: reroll
// An unknown activation.
builtin.module {
  tb.step attributes {vocab = 4, context = 8} {
  ^bb0(%token: index, %position: index):
    %x = tb.embedding(%token) {weight = @wte, offset = 0} : (index) -> tensor<4xf32>
    %y = tb.activation(%x) {kind = "softplus"} : (tensor<4xf32>) -> tensor<4xf32>
    tb.return(%y) : tensor<4xf32>
  }
}
// -----
// error: kind must be one of gelu_tanh
