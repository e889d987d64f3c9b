// passes: reroll
// Arguments that name an operand there is not.
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%ids: tensor<1x?xi64>):
    %y = tb.aten(%ids) {target = "aten.view.default", args = ["%1"]} : (tensor<1x?xi64>) -> tensor<1x?xi64>
    tb.return(%y) : tensor<1x?xi64>
  }
}
// -----
// error: arguments name operands [1] of 1
