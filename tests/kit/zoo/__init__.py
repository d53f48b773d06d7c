"""Tiny diffusion transformers to test on; what `DECIDING` compute depends on the values of their conditions.

Each takes a second or less to make and has two blocks of each kind, random weights everywhere (no gate,
table or last projection is zero), and outputs of order one.

    case = CASES["flux"]
    model = case.make()
    static = case.static(batch=2)
    latents = case.latents(batch=2)
    for t in (1.0, 0.75, 0.5, 0.25):
        output = model(**case.call(static, latents, t))
        latents = latents - 0.25 * case.prediction(output)

`roles` counts the residual branches by role. The tables come from reading the sources, so that an analysis
can be checked against them; the reasons stand beside each case. One branch is one residual add that a block
makes on the image stream or on the text stream, if it reaches the output. A name ends in `.context` if the
add is on the text stream. Embeddings, text refiners and final layers have none.

                    blocks  self  self     self      cross  joint  joint     mlp  mlp       parallel
                                  .spatial .temporal               .context       .context
    dit                2     2                                               2
    pixart             2     2                         2                     2
    sd3                2                                       2      1      2       1
    flux              2+2                                      2      2      2       2         2
    latte             2+2           2         2        2                     4
    cogvideox          2                                       2      2      2       1
    mochi              2                                       2      1      2       1
    wan                2     2                         2                     2
    hunyuan_video     2+2                                      2      2      2       2         2
    ltx                2     2                         2                     2
    allegro            2     2                         2                     2
    qwen_image         2                                       2      1      2       1
    sana               2     2                         2                     2
    chunked_dit        2     2                                               2
    functional_mmdit  2+2                                      2      2      2       2         2
    factorised_dit    2+2           2         2        4                     4

CogVideoX's last MLP takes text and video concatenated and only its video rows are used afterwards: the last
`joint.context` reaches the output by data flow, though not by value.
"""

from zoo import deciding_models, diffusers_models, plain_models
from zoo.case import Case

DIFFUSERS: dict[str, Case] = {case.name: case for case in diffusers_models.CASES}
PLAIN: dict[str, Case] = {case.name: case for case in plain_models.CASES}
CASES: dict[str, Case] = {**DIFFUSERS, **PLAIN}
DECIDING: dict[str, Case] = {case.name: case for case in deciding_models.CASES}

__all__ = ["CASES", "DECIDING", "DIFFUSERS", "PLAIN", "Case"]
