// passes: recognise
// Attention written out, its mask a position sub-graph that stays to be classified.
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%ids: tensor<1x?xi64>):
    %table = tb.parameter {source = @table} : tensor<5x4xf32>
    %n = tb.aten(%ids) {target = "aten.sym_size.int", args = ["%0", 1]} : (tensor<1x?xi64>) -> index
    %later = tb.aten(%n) {target = "aten.full.default", args = [["%0", "%0"], true]} : (index) -> tensor<?x?xi1>
    %x = tb.aten(%table, %ids) {target = "aten.embedding.default", args = ["%0", "%1"]} : (tensor<5x4xf32>, tensor<1x?xi64>) -> tensor<1x?x4xf32>
    %h = tb.aten(%x) {target = "aten.view.default", args = ["%0", [1, -1, 2, 2]]} : (tensor<1x?x4xf32>) -> tensor<1x?x2x2xf32>
    %q = tb.aten(%h) {target = "aten.transpose.int", args = ["%0", 1, 2]} : (tensor<1x?x2x2xf32>) -> tensor<1x2x?x2xf32>
    %k = tb.aten(%q) {target = "aten.transpose.int", args = ["%0", -2, -1]} : (tensor<1x2x?x2xf32>) -> tensor<1x2x2x?xf32>
    %s = tb.aten(%q, %k) {target = "aten.matmul.default", args = ["%0", "%1"]} : (tensor<1x2x?x2xf32>, tensor<1x2x2x?xf32>) -> tensor<1x2x?x?xf32>
    %d = tb.aten(%s) {target = "aten.div.Tensor", args = ["%0", 2.0 : f64]} : (tensor<1x2x?x?xf32>) -> tensor<1x2x?x?xf32>
    %m = tb.aten(%d, %later) {target = "aten.masked_fill.Scalar", args = ["%0", "%1", 0xfff0000000000000 : f64]} : (tensor<1x2x?x?xf32>, tensor<?x?xi1>) -> tensor<1x2x?x?xf32>
    %p = tb.aten(%m) {target = "aten.softmax.int", args = ["%0", -1]} : (tensor<1x2x?x?xf32>) -> tensor<1x2x?x?xf32>
    %a = tb.aten(%p, %q) {target = "aten.matmul.default", args = ["%0", "%1"]} : (tensor<1x2x?x?xf32>, tensor<1x2x?x2xf32>) -> tensor<1x2x?x2xf32>
    tb.return(%a) : tensor<1x2x?x2xf32>
  }
}
// -----
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%ids: tensor<1x?xi64>):
    %n = tb.aten(%ids) {target = "aten.sym_size.int", args = ["%0", 1]} : (tensor<1x?xi64>) -> index
    %later = tb.aten(%n) {target = "aten.full.default", args = [["%0", "%0"], true]} : (index) -> tensor<?x?xi1>
    %x = tb.embedding(%ids) {weight = @table, offset = 0} : (tensor<1x?xi64>) -> tensor<1x?x4xf32>
    %h = tb.aten(%x) {target = "aten.view.default", args = ["%0", [1, -1, 2, 2]]} : (tensor<1x?x4xf32>) -> tensor<1x?x2x2xf32>
    %q = tb.aten(%h) {target = "aten.transpose.int", args = ["%0", 1, 2]} : (tensor<1x?x2x2xf32>) -> tensor<1x2x?x2xf32>
    %allowed = tb.aten(%later) {target = "aten.logical_not.default", args = ["%0"]} : (tensor<?x?xi1>) -> tensor<?x?xi1>
    %a = tb.attention(%q, %q, %q, %allowed) {heads = 2, kv_heads = 2, head_dim = 2, scale = 0.5 : f32} : (tensor<1x2x?x2xf32>, tensor<1x2x?x2xf32>, tensor<1x2x?x2xf32>, tensor<?x?xi1>) -> tensor<1x2x?x2xf32>
    tb.return(%a) : tensor<1x2x?x2xf32>
  }
}
