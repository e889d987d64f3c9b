// passes: make-incremental
// A view that moves the tokens without a transposition mixes them.
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%ids: tensor<1x?xi64>):
    %x = tb.embedding(%ids) {weight = @wte, offset = 0} : (tensor<1x?xi64>) -> tensor<1x?x4xf32>
    %y = tb.aten(%x) {node = "turn", target = "aten.view.default", args = ["%0", [1, 4, -1]]} : (tensor<1x?x4xf32>) -> tensor<1x4x?xf32>
    %z = tb.aten(%y) {node = "back", target = "aten.transpose.int", args = ["%0", 1, 2]} : (tensor<1x4x?xf32>) -> tensor<1x?x4xf32>
    tb.return(%z) : tensor<1x?x4xf32>
  }
}
// -----
// error: 1 operation cannot be lowered: turn: viewing [1, T, 4] as [1, 4, T] mixes tokens
