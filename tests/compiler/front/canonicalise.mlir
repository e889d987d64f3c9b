// passes: canonicalise
// Copies, dropout at inference and views to the same type vanish; equal operations merge; unused ones go.
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%ids: tensor<1x?xi64>):
    %table = tb.parameter {source = @table} : tensor<5x4xf32>
    %n = tb.aten(%ids) {target = "aten.sym_size.int", args = ["%0", 1]} : (tensor<1x?xi64>) -> index
    %m = tb.aten(%ids) {target = "aten.sym_size.int", args = ["%0", 1]} : (tensor<1x?xi64>) -> index
    %unused = tb.aten(%m) {target = "aten.arange.default", args = ["%0"]} : (index) -> tensor<?xi64>
    %x = tb.aten(%table, %ids) {target = "aten.embedding.default", args = ["%0", "%1"]} : (tensor<5x4xf32>, tensor<1x?xi64>) -> tensor<1x?x4xf32>
    %a = tb.aten(%x) {target = "aten.dropout.default", args = ["%0", 0.1 : f64, false]} : (tensor<1x?x4xf32>) -> tensor<1x?x4xf32>
    %b = tb.aten(%a) {target = "aten.alias.default", args = ["%0"]} : (tensor<1x?x4xf32>) -> tensor<1x?x4xf32>
    %c = tb.aten(%b, %n) {target = "aten.view.default", args = ["%0", [1, "%1", 4]]} : (tensor<1x?x4xf32>, index) -> tensor<1x?x4xf32>
    %d = tb.aten(%c, %n) {target = "aten.view.default", args = ["%0", ["%1", 4]]} : (tensor<1x?x4xf32>, index) -> tensor<?x4xf32>
    %e = tb.aten(%c, %m) {target = "aten.view.default", args = ["%0", ["%1", 4]]} : (tensor<1x?x4xf32>, index) -> tensor<?x4xf32>
    %f = tb.aten(%d, %e) {target = "aten.add.Tensor", args = ["%0", "%1"]} : (tensor<?x4xf32>, tensor<?x4xf32>) -> tensor<?x4xf32>
    tb.return(%f) : tensor<?x4xf32>
  }
}
// -----
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%ids: tensor<1x?xi64>):
    %table = tb.parameter {source = @table} : tensor<5x4xf32>
    %n = tb.aten(%ids) {target = "aten.sym_size.int", args = ["%0", 1]} : (tensor<1x?xi64>) -> index
    %x = tb.aten(%table, %ids) {target = "aten.embedding.default", args = ["%0", "%1"]} : (tensor<5x4xf32>, tensor<1x?xi64>) -> tensor<1x?x4xf32>
    %d = tb.aten(%x, %n) {target = "aten.view.default", args = ["%0", ["%1", 4]]} : (tensor<1x?x4xf32>, index) -> tensor<?x4xf32>
    %f = tb.aten(%d, %d) {target = "aten.add.Tensor", args = ["%0", "%1"]} : (tensor<?x4xf32>, tensor<?x4xf32>) -> tensor<?x4xf32>
    tb.return(%f) : tensor<?x4xf32>
  }
}
