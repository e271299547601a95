"""Every tab, light and dark, by axe-core's rules; and by keyboard alone."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT
from tests.gradio_app.browser import LAPTOP, PHONE, generated, needs_browser, set_steps, tab

AXE = ROOT / "node_modules" / "axe-core" / "axe.min.js"  # npm install --no-save axe-core
TABS = ("Generate", "Library", "Compare", "Train", "Inspect", "History")
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]

pytestmark = [pytest.mark.slow, needs_browser]


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not here: npm install --no-save axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_axe_finds_nothing(pages, scheme, size) -> None:
    page = pages(f"?__theme={scheme}", reduced_motion="reduce", **size)  # a button that is fading in has other colours
    page.add_script_tag(path=AXE)
    set_steps(page, 2)
    generated(page)
    found = []
    for name in TABS:
        if name != "Generate":
            tab(page, name)
        page.get_by_role("tabpanel").locator("visible=true").first.wait_for()
        result = page.evaluate("rules => axe.run(document, {runOnly: rules, resultTypes: ['violations']})", RULES)
        found += [
            f"{name}: {violation['id']} ({violation['help']}): {node['html'][:160]}: {node['failureSummary'][:200]}"
            for violation in result["violations"]
            for node in violation["nodes"]
        ]
    assert not found, "\n".join(found)


def test_keys_alone_reach_everything_in_order(page) -> None:
    """From the first tab on, Tab visits what Generate has in the order of reading, and the focus is to be seen."""
    page.get_by_role("tab", name="Generate").focus()
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        now = page.evaluate(
            """() => {
                const at = document.activeElement, tile = at.closest('.tile');
                const style = getComputedStyle(tile || at);
                const owner = at.closest('#adapter, #prompt, #seed, #random, #generate, #strength, #lines');
                const seen = style.outlineStyle !== 'none' || style.boxShadow !== 'none';
                return [owner?.id || at.textContent.trim().slice(0, 30), seen];
            }"""
        )
        seen.append(now)
    names = [name for name, _ in seen]
    order = [names.index(name) for name in ("adapter", "prompt", "seed", "random", "generate", "strength")]
    assert order == sorted(order), names
    assert all(shown for name, shown in seen if name in ("adapter", "prompt", "seed", "random", "generate")), seen
    # arrows choose among the tiles
    page.locator("#adapter input:checked").focus()
    before = page.locator("#adapter input:checked").get_attribute("value")
    page.keyboard.press("ArrowRight")
    assert page.locator("#adapter input:checked").get_attribute("value") != before
    page.wait_for_function("new URL(location).searchParams.has('adapter')")
