// passes: recognise
// A matrix product with a parameter, a bias added after it, GELU's tanh form written out, a scaling, a transposed weight.
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%ids: tensor<1x?xi64>):
    %table = tb.parameter {source = @table} : tensor<5x4xf32>
    %w = tb.parameter {source = @w} : tensor<4x6xf32>
    %b = tb.parameter {source = @b} : tensor<6xf32>
    %x = tb.aten(%table, %ids) {target = "aten.embedding.default", args = ["%0", "%1"]} : (tensor<5x4xf32>, tensor<1x?xi64>) -> tensor<1x?x4xf32>
    %p = tb.aten(%x, %w) {target = "aten.matmul.default", args = ["%0", "%1"]} : (tensor<1x?x4xf32>, tensor<4x6xf32>) -> tensor<1x?x6xf32>
    %h = tb.aten(%b, %p) {target = "aten.add.Tensor", args = ["%0", "%1"]} : (tensor<6xf32>, tensor<1x?x6xf32>) -> tensor<1x?x6xf32>
    %g0 = tb.aten(%h) {target = "aten.pow.Tensor_Scalar", args = ["%0", 3]} : (tensor<1x?x6xf32>) -> tensor<1x?x6xf32>
    %g1 = tb.aten(%g0) {target = "aten.mul.Tensor", args = ["%0", 0.044715 : f64]} : (tensor<1x?x6xf32>) -> tensor<1x?x6xf32>
    %g2 = tb.aten(%h, %g1) {target = "aten.add.Tensor", args = ["%0", "%1"]} : (tensor<1x?x6xf32>, tensor<1x?x6xf32>) -> tensor<1x?x6xf32>
    %g3 = tb.aten(%g2) {target = "aten.mul.Tensor", args = ["%0", 0.7978845608028654 : f64]} : (tensor<1x?x6xf32>) -> tensor<1x?x6xf32>
    %g4 = tb.aten(%g3) {target = "aten.tanh.default", args = ["%0"]} : (tensor<1x?x6xf32>) -> tensor<1x?x6xf32>
    %g5 = tb.aten(%g4) {target = "aten.add.Tensor", args = ["%0", 1.0 : f64]} : (tensor<1x?x6xf32>) -> tensor<1x?x6xf32>
    %g6 = tb.aten(%h, %g5) {target = "aten.mul.Tensor", args = ["%0", "%1"]} : (tensor<1x?x6xf32>, tensor<1x?x6xf32>) -> tensor<1x?x6xf32>
    %g7 = tb.aten(%g6) {target = "aten.mul.Tensor", args = ["%0", 0.5 : f64]} : (tensor<1x?x6xf32>) -> tensor<1x?x6xf32>
    %s = tb.aten(%g7) {target = "aten.div.Tensor", args = ["%0", 4.0 : f64]} : (tensor<1x?x6xf32>) -> tensor<1x?x6xf32>
    %t = tb.aten(%w) {target = "aten.transpose.int", args = ["%0", 0, 1]} : (tensor<4x6xf32>) -> tensor<6x4xf32>
    %y = tb.aten(%s, %t) {target = "aten.matmul.default", args = ["%0", "%1"]} : (tensor<1x?x6xf32>, tensor<6x4xf32>) -> tensor<1x?x4xf32>
    tb.return(%y) : tensor<1x?x4xf32>
  }
}
// -----
builtin.module {
  tb.graph attributes {context = 8} {
  ^bb0(%ids: tensor<1x?xi64>):
    %x = tb.embedding(%ids) {weight = @table, offset = 0} : (tensor<1x?xi64>) -> tensor<1x?x4xf32>
    %h = tb.linear(%x) {weight = @w, bias = @b, layout = "in_out"} : (tensor<1x?x4xf32>) -> tensor<1x?x6xf32>
    %g = tb.activation(%h) {kind = "gelu_tanh"} : (tensor<1x?x6xf32>) -> tensor<1x?x6xf32>
    %s = tb.scale(%g) {value = 0.25 : f32} : (tensor<1x?x6xf32>) -> tensor<1x?x6xf32>
    %y = tb.linear(%s) {weight = @w, layout = "out_in"} : (tensor<1x?x6xf32>) -> tensor<1x?x4xf32>
    tb.return(%y) : tensor<1x?x4xf32>
  }
}
