"""Where golden.json comes from, without the authors' code."""
import pytest

from golden import CASES
from test_model import GOLDEN, build, hashed, hashed_weights


def test_the_formula_gives_the_same_numbers_everywhere():
    assert hashed((2, 2), 0).flatten().tolist() == [-0.2466706484556198, -0.4570610523223877, 0.719473123550415, -0.14875105023384094]
    weights = hashed_weights(build("vit"), seed=3)
    for name, value, scale in (("norm.weight", 1, 0.2), ("norm.bias", 0, 0.05), ("cls_token", 0, 0.5),
                               ("blocks.0.attn.qkv.weight", 0, 3 / 128 ** 0.5), ("blocks.0.mlp.fc2.weight", 0, 1 / 512 ** 0.5)):
        u = hashed(weights[name].shape, 3000 + sorted(weights).index(name))
        assert weights[name].flatten()[:9].tolist() == pytest.approx((value + scale * u).flatten()[:9].tolist())


def test_the_file_has_the_cases_that_the_program_makes_and_says_from_what():
    answers = ("n_parameters", "logits", "logit_sum")
    fields = [{name: value for name, value in case.items() if name not in answers} for case in GOLDEN["cases"]]
    modified = dict(step="rmsnorm", mask="modified")
    assert fields == [case | modified if case["step"] == "modified" else case for case in CASES]
    assert set(GOLDEN["made_with"]) == {"code", "soft_mask", "steps_below", "torch", "timm"}
