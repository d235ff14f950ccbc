"""The filter above a report's answers: by words, and by who is better. It runs in the page, and asks for nothing."""

from __future__ import annotations

from collections.abc import Sequence

_SIDES = {"gained": "the judged arm is better", "lost": "its rival is better", "differs": "texts differ"}

FILTER_SCRIPT = """<script>
(() => {
  const box = document.getElementById("answer-filter");
  const words = document.getElementById("answer-words");
  const side = document.getElementById("answer-side");
  const told = document.getElementById("answers-shown");
  const cards = [...document.querySelectorAll(".prediction")];
  const texts = cards.map((card) => card.textContent.toLowerCase());
  const choose = () => {
    const wanted = words.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let count = 0;
    cards.forEach((card, at) => {
      const fits = !side.value || card.dataset.side === side.value
        || (side.value === "any" && card.dataset.side !== "");
      card.hidden = !(fits && wanted.every((word) => texts[at].includes(word)));
      count += card.hidden ? 0 : 1;
    });
    told.textContent = `${count} of ${cards.length} shown`;
  };
  box.hidden = false;
  words.addEventListener("input", choose);
  side.addEventListener("change", choose);
  choose();
})();
</script>
"""
"""Shows the filter, so that nobody sees one that does nothing, and hides answers that it leaves out."""


def answer_filter(sides: Sequence[str]) -> str:
    """Return the controls; `sides` are those that the answers have, as `disagreements` calls them."""
    choices = [("", "all records"), *([("any", "arms disagree")] if sides else [])]
    choices += [(side, _SIDES[side]) for side in sides]
    options = "".join(f'<option value="{value}">{words}</option>' for value, words in choices)
    return (
        '<div id="answer-filter" class="filter" role="search" aria-label="Answers" hidden>'
        '<label>Words <input id="answer-words" type="search" autocomplete="off"></label> '
        f'<label>Records <select id="answer-side">{options}</select></label> '
        '<span id="answers-shown" role="status"></span></div>'
    )
