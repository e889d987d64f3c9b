// passes: make-incremental
// A mean over the tokens mixes positions.
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%ids: tensor<1x?xi64>):
    %x = tb.embedding(%ids) {weight = @wte, offset = 0} : (tensor<1x?xi64>) -> tensor<1x?x4xf32>
    %m = tb.aten(%x) {node = "mean", target = "aten.mean.dim", args = ["%0", [1], true]} : (tensor<1x?x4xf32>) -> tensor<1x1x4xf32>
    %y = tb.aten(%x, %m) {node = "centre", target = "aten.sub.Tensor", args = ["%0", "%1"]} : (tensor<1x?x4xf32>, tensor<1x1x4xf32>) -> tensor<1x?x4xf32>
    tb.return(%y) : tensor<1x?x4xf32>
  }
}
// -----
// error: 1 operation cannot be lowered: mean: aten.mean.dim has no counterpart
