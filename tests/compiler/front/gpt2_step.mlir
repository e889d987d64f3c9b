// A GPT-2 of two layers, 32 wide, four heads, 97 tokens, 64 positions: what the front half hands to the back half.
builtin.module {
  tb.step attributes {vocab = 97, context = 64} {
  ^bb0(%token: index, %position: index):
    %wte = tb.embedding(%token) {weight = @"transformer.wte.weight", offset = 0} : (index) -> tensor<32xf32>
    %wpe = tb.embedding(%position) {weight = @"transformer.wpe.weight", offset = 0} : (index) -> tensor<32xf32>
    %x0 = tb.add(%wte, %wpe) : (tensor<32xf32>, tensor<32xf32>) -> tensor<32xf32>
    %xn = tb.repeat(%x0) attributes {count = 2, start = 0} {
    ^bb1(%x: tensor<32xf32>):
      %ln_1 = tb.layer_norm(%x) {weight = @"transformer.h.{}.ln_1.weight", bias = @"transformer.h.{}.ln_1.bias", eps = 1.0e-5 : f32} : (tensor<32xf32>) -> tensor<32xf32>
      %qkv = tb.linear(%ln_1) {weight = @"transformer.h.{}.attn.c_attn.weight", bias = @"transformer.h.{}.attn.c_attn.bias", layout = "in_out"} : (tensor<32xf32>) -> tensor<96xf32>
      %q = tb.slice(%qkv) {start = 0, size = 32} : (tensor<96xf32>) -> tensor<32xf32>
      %k = tb.slice(%qkv) {start = 32, size = 32} : (tensor<96xf32>) -> tensor<32xf32>
      %v = tb.slice(%qkv) {start = 64, size = 32} : (tensor<96xf32>) -> tensor<32xf32>
      %att = tb.attention(%q, %k, %v) {heads = 4, kv_heads = 4, head_dim = 8, scale = 0.353553385 : f32, mask = "causal"} : (tensor<32xf32>, tensor<32xf32>, tensor<32xf32>) -> tensor<32xf32>
      %proj = tb.linear(%att) {weight = @"transformer.h.{}.attn.c_proj.weight", bias = @"transformer.h.{}.attn.c_proj.bias", layout = "in_out"} : (tensor<32xf32>) -> tensor<32xf32>
      %x1 = tb.add(%proj, %x) : (tensor<32xf32>, tensor<32xf32>) -> tensor<32xf32>
      %ln_2 = tb.layer_norm(%x1) {weight = @"transformer.h.{}.ln_2.weight", bias = @"transformer.h.{}.ln_2.bias", eps = 1.0e-5 : f32} : (tensor<32xf32>) -> tensor<32xf32>
      %fc = tb.linear(%ln_2) {weight = @"transformer.h.{}.mlp.c_fc.weight", bias = @"transformer.h.{}.mlp.c_fc.bias", layout = "in_out"} : (tensor<32xf32>) -> tensor<128xf32>
      %act = tb.activation(%fc) {kind = "gelu_tanh"} : (tensor<128xf32>) -> tensor<128xf32>
      %mlp = tb.linear(%act) {weight = @"transformer.h.{}.mlp.c_proj.weight", bias = @"transformer.h.{}.mlp.c_proj.bias", layout = "in_out"} : (tensor<128xf32>) -> tensor<32xf32>
      %x2 = tb.add(%x1, %mlp) : (tensor<32xf32>, tensor<32xf32>) -> tensor<32xf32>
      tb.yield(%x2) : tensor<32xf32>
    } : (tensor<32xf32>) -> tensor<32xf32>
    %ln_f = tb.layer_norm(%xn) {weight = @"transformer.ln_f.weight", bias = @"transformer.ln_f.bias", eps = 1.0e-5 : f32} : (tensor<32xf32>) -> tensor<32xf32>
    %logits = tb.linear(%ln_f) {weight = @"transformer.wte.weight", layout = "out_in"} : (tensor<32xf32>) -> tensor<97xf32>
    tb.return(%logits) : tensor<97xf32>
  }
}
