// passes: make-incremental
// A sequence of another length is refused, even where its type looks the same.
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%ids: tensor<1x?xi64>):
    %x = tb.embedding(%ids) {weight = @wte, offset = 0} : (tensor<1x?xi64>) -> tensor<1x?x4xf32>
    %y = tb.aten(%x) {node = "cat", target = "aten.reshape.default", args = ["%0", [1, -1, 4]], symbolic = "axis 1 is 2*T"} : (tensor<1x?x4xf32>) -> tensor<1x?x4xf32>
    tb.return(%y) : tensor<1x?x4xf32>
  }
}
// -----
// error: cat: it changes the number of tokens: axis 1 is 2*T
