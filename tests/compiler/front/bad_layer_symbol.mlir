// passes: reroll
// A layer's number outside a loop has no meaning.
builtin.module {
  tb.step attributes {vocab = 4, context = 8} {
  ^bb0(%token: index, %position: index):
    %x = tb.embedding(%token) {weight = @wte, offset = 0} : (index) -> tensor<4xf32>
    %y = tb.linear(%x) {weight = @"h.{}.w", layout = "in_out"} : (tensor<4xf32>) -> tensor<4xf32>
    tb.return(%y) : tensor<4xf32>
  }
}
// -----
// error: numbers layers outside tb.repeat
