// passes: make-incremental
// Logits of the last position alone are refused.
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%ids: tensor<1x?xi64>):
    %x = tb.embedding(%ids) {weight = @wte, offset = 0} : (tensor<1x?xi64>) -> tensor<1x?x4xf32>
    %y = tb.aten(%x) {node = "last", target = "aten.select.int", args = ["%0", 1, -1]} : (tensor<1x?x4xf32>) -> tensor<1x4xf32>
    tb.return(%y) : tensor<1x4xf32>
  }
}
// -----
// error: 1 operation cannot be lowered: last: it takes some of the positions; compute every position
