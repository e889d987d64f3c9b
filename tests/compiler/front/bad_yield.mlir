// passes: reroll
// A loop that yields another type than it takes.
builtin.module {
  tb.step attributes {vocab = 4, context = 8} {
  ^bb0(%token: index, %position: index):
    %x = tb.embedding(%token) {weight = @wte, offset = 0} : (index) -> tensor<4xf32>
    %y = tb.repeat(%x) attributes {count = 2, start = 0} {
    ^bb1(%a: tensor<4xf32>):
      %b = tb.slice(%a) {start = 0, size = 2} : (tensor<4xf32>) -> tensor<2xf32>
      tb.yield(%b) : tensor<2xf32>
    } : (tensor<4xf32>) -> tensor<4xf32>
    tb.return(%y) : tensor<4xf32>
  }
}
// -----
// error: tb.repeat: yielded values must have
