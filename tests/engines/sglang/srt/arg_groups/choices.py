ATTENTION_BACKEND_CHOICES = ["triton", "torch_native", "flashinfer"]

add_attention_backend_choices = ATTENTION_BACKEND_CHOICES.extend
