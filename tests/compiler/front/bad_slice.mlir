// passes: reroll
// A slice beyond its operand.
builtin.module {
  tb.step attributes {vocab = 4, context = 8} {
  ^bb0(%token: index, %position: index):
    %x = tb.embedding(%token) {weight = @wte, offset = 0} : (index) -> tensor<4xf32>
    %y = tb.slice(%x) {start = 2, size = 4} : (tensor<4xf32>) -> tensor<4xf32>
    tb.return(%y) : tensor<4xf32>
  }
}
// -----
// error: tb.slice: 2 to 6 is outside 0 to 4
