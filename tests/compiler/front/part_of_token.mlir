// passes: make-incremental
// A norm of each head is not a norm of the token.
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%ids: tensor<1x?xi64>):
    %x = tb.embedding(%ids) {weight = @wte, offset = 0} : (tensor<1x?xi64>) -> tensor<1x?x4xf32>
    %h = tb.aten(%x) {target = "aten.view.default", args = ["%0", [1, -1, 2, 2]]} : (tensor<1x?x4xf32>) -> tensor<1x?x2x2xf32>
    %y = tb.rms_norm(%h) {node = "norm", weight = @n, eps = 1.0e-6 : f32} : (tensor<1x?x2x2xf32>) -> tensor<1x?x2x2xf32>
    %z = tb.aten(%y) {target = "aten.reshape.default", args = ["%0", [1, -1, 4]]} : (tensor<1x?x2x2xf32>) -> tensor<1x?x4xf32>
    tb.return(%z) : tensor<1x?x4xf32>
  }
}
// -----
// error: norm: it is a norm over parts of each token's values
