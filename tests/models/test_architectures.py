"""Every architecture of mlx-lm's, small: off it is mlx-lm's, on it does what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.peers.upstream import CannotFetch

from .architectures import Finding, document, find_all

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    """What came of all architectures; made once, it takes a minute."""
    try:
        return find_all()
    except CannotFetch as error:
        pytest.skip(str(error))


def test_none_of_them_is_wrong(findings):
    assert not {finding.name: finding.wrong for finding in findings if finding.wrong}


def test_the_families_that_people_run_are_not_refused(findings):
    refused = {finding.name: finding.refused for finding in findings if finding.refused}
    known = "qwen2 qwen3 qwen3_moe qwen3_next gemma gemma3 gemma3_text gemma3n gemma4 phi3 mixtral "
    known += "ministral3 mistral3 smollm3 olmo2 granite granitemoehybrid glm4 glm4_moe cohere2 "
    known += "gpt_oss llama llama4 lfm2 falcon_h1 stablelm starcoder2 exaone4 hunyuan ernie4_5"
    assert not {name: refused[name] for name in known.split() if name in refused}
    assert set(known.split()) <= {finding.name for finding in findings}


def test_a_token_takes_no_more_operations_than_in_mlx_lm(findings):
    more = {
        finding.name: finding.operations
        for finding in findings
        if finding.operations[1] > finding.operations[0]
    }
    assert not more


def test_the_documented_table_is_what_was_found(findings):
    assert DOCUMENT.read_text(encoding="utf-8") == document(findings), (
        "write it anew: python -m tests.models.architectures > docs/architectures.md"
    )
