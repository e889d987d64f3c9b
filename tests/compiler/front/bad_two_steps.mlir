// passes: reroll
// Two steps in a module.
builtin.module {
  tb.step attributes {vocab = 4, context = 8} {
  ^bb0(%token: index, %position: index):
    %x = tb.embedding(%token) {weight = @wte, offset = 0} : (index) -> tensor<4xf32>
    tb.return(%x) : tensor<4xf32>
  }
  tb.step attributes {vocab = 4, context = 8} {
  ^bb0(%token: index, %position: index):
    %x = tb.embedding(%token) {weight = @wte, offset = 0} : (index) -> tensor<4xf32>
    tb.return(%x) : tensor<4xf32>
  }
}
// -----
// error: must hold one tb.graph or one tb.step, and before it the encoder's if there is one, not 2 operations
