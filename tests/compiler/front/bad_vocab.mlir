// passes: reroll
// The logits must number the vocabulary.
builtin.module {
  tb.step attributes {vocab = 4, context = 8} {
  ^bb0(%token: index, %position: index):
    %x = tb.embedding(%token) {weight = @wte, offset = 0} : (index) -> tensor<4xf32>
    %y = tb.slice(%x) {start = 0, size = 3} : (tensor<4xf32>) -> tensor<3xf32>
    tb.return(%y) : tensor<3xf32>
  }
}
// -----
// error: tb.step returns one vector of vocab = 4 logits
