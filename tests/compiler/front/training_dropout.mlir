// passes: canonicalise, make-incremental
// Dropout while training is refused, and what follows it is not blamed.
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%ids: tensor<1x?xi64>):
    %x = tb.embedding(%ids) {weight = @wte, offset = 0} : (tensor<1x?xi64>) -> tensor<1x?x4xf32>
    %y = tb.aten(%x) {node = "drop", target = "aten.dropout.default", args = ["%0", 0.1 : f64, true]} : (tensor<1x?x4xf32>) -> tensor<1x?x4xf32>
    %z = tb.add(%y, %x) : (tensor<1x?x4xf32>, tensor<1x?x4xf32>) -> tensor<1x?x4xf32>
    tb.return(%z) : tensor<1x?x4xf32>
  }
}
// -----
// error: 1 operation cannot be lowered: drop: aten.dropout.default has no counterpart
