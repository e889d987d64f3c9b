// passes: classify-masks
// Every second row is no position.
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%ids: tensor<1x?xi64>):
    %table = tb.parameter {source = @wpe} : tensor<20x4xf32>
    %n = tb.aten(%ids) {target = "aten.sym_size.int", args = ["%0", 1]} : (tensor<1x?xi64>) -> index
    %i = tb.aten(%n) {target = "aten.arange.default", args = ["%0"]} : (index) -> tensor<?xi64>
    %p = tb.aten(%i) {target = "aten.mul.Tensor", args = ["%0", 2]} : (tensor<?xi64>) -> tensor<?xi64>
    %x = tb.aten(%table, %p) {node = "wpe", target = "aten.embedding.default", args = ["%0", "%1"]} : (tensor<20x4xf32>, tensor<?xi64>) -> tensor<?x4xf32>
    tb.return(%x) : tensor<?x4xf32>
  }
}
// -----
// error: wpe: its rows are not consecutive positions at 2 tokens
