"""Every tab with everything open in it, light and dark, by axe-core's rules; and by keyboard alone."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT
from tests.gradio_app.browser import (
    choose,
    generated,
    needs_browser,
    pick,
    set_number,
    set_steps,
    tab,
    wait_for_image,
    wait_for_status,
)

AXE = ROOT / "node_modules" / "axe-core" / "axe.min.js"  # npm install --no-save axe-core
TABS = ("Generate", "Library", "Compare", "Train", "Inspect", "History")
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]

pytestmark = [pytest.mark.slow, needs_browser]


def fill(page, name: str, photos) -> None:
    """Go to a tab and bring up what it can show."""
    if name != "Generate":
        tab(page, name)
    if name == "Generate":
        page.get_by_role("button", name="Mix in a second adapter").click()
        set_steps(page, 2)
        generated(page)
    elif name == "Library":
        choose(page, "dog", "#library")
        page.locator("#about").get_by_text("trainable numbers").wait_for()
        page.get_by_role("button", name="For other tools").click()
        page.locator("#export").wait_for()
    elif name == "Compare":
        page.locator("#strengths input, #strengths textarea").fill("1")
        set_steps(page, 2)
        set_number(page, "Seeds", 1)
        page.locator("#compare:enabled").click()
        wait_for_status(page, "done", "#compare-status")
        wait_for_image(page, "#sheet")
    elif name == "Train":
        page.locator("#photos input[type=file]").set_input_files(sorted(photos.iterdir()))
        page.wait_for_function("document.querySelectorAll('#thumbnails img').length === 3")
    elif name == "Inspect":
        page.locator("#inspect").click()
        page.wait_for_function("document.querySelectorAll('#pictures img').length >= 3")
    elif name == "History":
        pick(page)
        page.locator("#image-settings").get_by_text("guidance").wait_for()


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not here: npm install --no-save axe-core")
def test_axe_finds_nothing(page, photos) -> None:
    page.add_script_tag(path=AXE)
    found = []
    for name in TABS:
        fill(page, name, photos)
        for scheme in ("light", "dark"):
            page.evaluate("dark => document.body.classList.toggle('dark', dark)", scheme == "dark")
            result = page.evaluate("rules => axe.run(document, {runOnly: rules, resultTypes: ['violations']})", RULES)
            found += [
                f"{name}, {scheme}: {violation['id']} ({violation['help']}): {node['html'][:160]}: "
                f"{node['failureSummary'][:200]}"
                for violation in result["violations"]
                for node in violation["nodes"]
            ]
        page.evaluate("document.body.classList.remove('dark')")
    assert not found, "\n".join(found)


# Numbers what can be reached on the tab that is shown, in the order of the page; of radio buttons one is.
NUMBERED = """() => {
    const shown = part => part.checkVisibility({visibilityProperty: true}) && part.getClientRects().length > 0;
    const panel = [...document.querySelectorAll('[role=tabpanel]')].find(shown);
    const all = [...panel.querySelectorAll('button, input, textarea, select, a[href]')].filter(
        part => shown(part) && !part.disabled && part.tabIndex >= 0);
    const groups = new Set();
    window.controls = all.filter(part => {
        if (part.type !== 'radio') return true;
        const first = !groups.has(part.name);
        groups.add(part.name);
        return first;
    });
    return controls.map(part => part.id || part.ariaLabel || part.name || part.textContent.trim());
}"""

# The number of what has the focus, null where it is elsewhere; and whether the focus is to be seen.
FOCUSED = """() => {
    const at = document.activeElement, outlined = at.closest('.tile') || at, style = getComputedStyle(outlined);
    const number = controls.findIndex(
        part => part === at || (at.type === 'radio' && part.type === 'radio' && part.name === at.name));
    return [number < 0 ? null : number, style.outlineStyle !== 'none' || style.boxShadow !== 'none'];
}"""


def walk(page, name: str) -> tuple[list[str], list[int]]:
    """What can be reached on a tab, and the numbers of what Tab visits, from the tab's own button to the end."""
    page.get_by_role("tab", name=name).locator("visible=true").focus()
    names, order = page.evaluate(NUMBERED), []
    for _ in range(len(names) + 20):
        page.keyboard.press("Tab")
        number, seen = page.evaluate(FOCUSED)
        if number is None:
            if order:
                break  # past the last one
            continue
        assert seen, (name, names[number])
        order.append(number)
    return names, list(dict.fromkeys(order))


def test_keys_alone_reach_everything_in_order(page) -> None:
    """Tab visits all that a tab has, in the order of the page, and the focus is to be seen; arrows choose."""
    for name in TABS:
        if name != "Generate":
            tab(page, name)
        closed = page.locator("[role=tabpanel] button.label-wrap:not(.open)").locator("visible=true")
        while closed.count():
            closed.first.click()
        names, order = walk(page, name)
        while page.evaluate(NUMBERED) != names:  # what was opened fills a moment later: from the start
            names, order = walk(page, name)
        assert order == list(range(len(names))), (name, names, order)
    tab(page, "Generate")
    page.locator("#adapter input:checked").focus()
    before = page.locator("#adapter input:checked").get_attribute("value")
    page.keyboard.press("ArrowRight")
    assert page.locator("#adapter input:checked").get_attribute("value") != before
    page.wait_for_function("new URL(location).searchParams.has('adapter')")
