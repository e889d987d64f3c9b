// passes: classify-masks
// Positions plus a constant are an offset.
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%ids: tensor<1x?xi64>):
    %table = tb.parameter {source = @wpe} : tensor<10x4xf32>
    %n = tb.aten(%ids) {target = "aten.sym_size.int", args = ["%0", 1]} : (tensor<1x?xi64>) -> index
    %i = tb.aten(%n) {target = "aten.arange.default", args = ["%0"]} : (index) -> tensor<?xi64>
    %p = tb.aten(%i) {target = "aten.add.Tensor", args = ["%0", 2]} : (tensor<?xi64>) -> tensor<?xi64>
    %x = tb.aten(%table, %p) {node = "wpe", target = "aten.embedding.default", args = ["%0", "%1"]} : (tensor<10x4xf32>, tensor<?xi64>) -> tensor<?x4xf32>
    tb.return(%x) : tensor<?x4xf32>
  }
}
// -----
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%ids: tensor<1x?xi64>):
    %p = tb.positions : tensor<?xi64>
    %x = tb.embedding(%p) {node = "wpe", weight = @wpe, offset = 2} : (tensor<?xi64>) -> tensor<?x4xf32>
    tb.return(%x) : tensor<?x4xf32>
  }
}
