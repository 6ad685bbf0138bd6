"""Every architecture of mlx-lm's, small: off it is mlx-lm's, on it does what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.peers.upstream import CannotFetch

from .architectures import Finding, document, find_all, row

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"


KNOWN = set(
    "qwen2 qwen3 qwen3_moe qwen3_next gemma gemma3 gemma3_text gemma3n gemma4 phi3 mixtral "
    "ministral3 mistral3 smollm3 olmo2 granite granitemoehybrid glm4 glm4_moe cohere2 "
    "gpt_oss llama llama4 lfm2 falcon_h1 stablelm starcoder2 exaone4 hunyuan ernie4_5".split()
)
ONE_OF = 4  # of the others, in an ordinary run; --all looks at all


@pytest.fixture(scope="module")
def findings(request: pytest.FixtureRequest) -> list[Finding]:
    """What came of the architectures that people run and of some others; all take a minute."""
    every = request.config.getoption("--all")
    try:
        return find_all(lambda i, name: every or name in KNOWN or i % ONE_OF == 0)
    except CannotFetch as error:
        pytest.skip(str(error))


def test_none_of_them_is_wrong(findings):
    assert not {finding.name: finding.wrong for finding in findings if finding.wrong}


def test_the_families_that_people_run_are_not_refused(findings):
    refused = {finding.name: finding.refused for finding in findings if finding.refused}
    assert not {name: refused[name] for name in KNOWN if name in refused}
    assert {finding.name for finding in findings} >= KNOWN


def test_a_token_takes_no_more_operations_than_in_mlx_lm(findings):
    more = {
        finding.name: finding.operations
        for finding in findings
        if finding.operations[1] > finding.operations[0]
    }
    assert not more


def test_the_documented_table_is_what_was_found(request: pytest.FixtureRequest, findings):
    text, how = (
        DOCUMENT.read_text(encoding="utf-8"),
        ("write it anew: python -m tests.models.architectures > docs/architectures.md"),
    )
    if request.config.getoption("--all"):
        assert text == document(findings), how
    lines = text.splitlines(keepends=True)
    assert [row(finding) for finding in findings if row(finding) not in lines] == [], how
