// passes: reroll
// Another dialect.
builtin.module {
  tb.step attributes {vocab = 4, context = 8} {
  ^bb0(%token: index, %position: index):
    %x = tb.embedding(%token) {weight = @wte, offset = 0} : (index) -> tensor<4xf32>
    %y = arith.addf %x, %x : tensor<4xf32>
    tb.return(%y) : tensor<4xf32>
  }
}
// -----
// error: syntax error at line 7
