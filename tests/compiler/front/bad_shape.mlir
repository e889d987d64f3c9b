// passes: reroll
// A step's values are vectors.
builtin.module {
  tb.step attributes {vocab = 4, context = 8} {
  ^bb0(%token: index, %position: index):
    %x = tb.embedding(%token) {weight = @wte, offset = 0} : (index) -> tensor<4xf32>
    %y = "tb.aten"(%x) <{target = "aten.relu.default", args = ["%0"]}> : (tensor<4xf32>) -> tensor<4xf32>
    tb.return(%y) : tensor<4xf32>
  }
}
// -----
// error: tb.aten may not stand in tb.step
