// passes: make-incremental
// Tokens in reverse are not token by token.
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%ids: tensor<1x?xi64>):
    %x = tb.embedding(%ids) {weight = @wte, offset = 0} : (tensor<1x?xi64>) -> tensor<1x?x4xf32>
    %y = tb.aten(%x) {node = "flip", target = "aten.flip.default", args = ["%0", [1]]} : (tensor<1x?x4xf32>) -> tensor<1x?x4xf32>
    tb.return(%y) : tensor<1x?x4xf32>
  }
}
// -----
// error: 1 operation cannot be lowered: flip: aten.flip.default has no counterpart
