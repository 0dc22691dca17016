"""How the papers are reproduced: experiments, published counts, benchmarks, analysis figures."""
