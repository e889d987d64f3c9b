// passes: classify-masks
// The table must have a row for every position of the context.
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%ids: tensor<1x?xi64>):
    %table = tb.parameter {source = @wpe} : tensor<9x4xf32>
    %n = tb.aten(%ids) {target = "aten.sym_size.int", args = ["%0", 1]} : (tensor<1x?xi64>) -> index
    %i = tb.aten(%n) {target = "aten.arange.default", args = ["%0"]} : (index) -> tensor<?xi64>
    %p = tb.aten(%i) {target = "aten.add.Tensor", args = ["%0", 2]} : (tensor<?xi64>) -> tensor<?xi64>
    %x = tb.aten(%table, %p) {node = "wpe", target = "aten.embedding.default", args = ["%0", "%1"]} : (tensor<9x4xf32>, tensor<?xi64>) -> tensor<?x4xf32>
    tb.return(%x) : tensor<?x4xf32>
  }
}
// -----
// error: wpe: table wpe has 9 rows, 8 positions from 2 need more; declare a context of 7
