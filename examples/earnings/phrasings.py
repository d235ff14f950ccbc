"""Phrasings of earnings news, and the small template language that they are written in.

`{slot}` is replaced by a value. `[name:shown|otherwise]` gives `shown` when the value of that name is known and
`otherwise` (empty when left out) when it is not; brackets do not nest. A phrasing can write any record, whichever
field is missing from it.

Slots: company, possessive (of the company), period, revenue, eps, guided (a verb), and the distractors: prior (revenue
of the year before), consensus (earnings per share that analysts expected), segment with segment_revenue.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

DISTRACTORS = ("prior", "consensus", "segment")
"""Figures that look like an answer and are none. They are known by their wording."""

_CHOICE = re.compile(r"\[(\w+):([^\[\]|]*)(?:\|([^\[\]]*))?\]")

TRAIN_PHRASINGS = (
    "{company} reported [revenue:revenue of {revenue}|its results][period: for {period}][prior:,"
    " compared with {prior} a year earlier]. [eps:Earnings per share were {eps}][consensus:, against a"
    " consensus estimate of {consensus}][eps:. ][guided:The company {guided} its full-year guidance.]",
    "[period:In {period}, {company}|{company}] [revenue:generated sales of {revenue}|published its"
    " accounts][eps: and earned {eps} per share]. [segment:The {segment} division contributed"
    " {segment_revenue}. ][consensus:Analysts had expected {consensus} per share. ][guided:Management"
    " {guided} the outlook.]",
    "{possessive} [revenue:revenue came to {revenue}|books are closed][period: for {period}][prior:,"
    " after {prior} in the year before]. [segment:Its {segment} unit accounted for {segment_revenue}."
    " ][eps:EPS was {eps}. ][guided:The annual forecast was {guided}.]",
    "Shares of {company} moved after [period:figures for {period}|new figures]. [revenue:Revenue was"
    " {revenue}. ][segment:Sales in the {segment} segment alone were {segment_revenue}. ][eps:The group"
    " earned {eps} per share][consensus:, while Wall Street was looking for {consensus}][eps:."
    " ][guided:It {guided} its forecast for the year.]",
    "{company} posted [eps:earnings per share of {eps}|its figures][period: for {period}][consensus:;"
    " the consensus stood at {consensus}]. [revenue:Revenue reached {revenue}][prior:, versus {prior} a"
    " year ago][revenue:. ][guided:Guidance was {guided}.]",
    "[guided:{company} {guided} its outlook|{company} spoke to investors][period: as it reported on"
    " {period}]. [revenue:Total revenue stood at {revenue}][prior:, from {prior} the year"
    " before][revenue:. ][segment:Revenue of the {segment} segment was {segment_revenue}. ][eps:EPS"
    " came in at {eps}.]",
    "[period:Results for {period}|New results]: {company} booked [revenue:revenue of {revenue}|further"
    " orders][eps: and earned {eps} per share]. [prior:A year earlier, revenue was {prior}."
    " ][consensus:The street had forecast EPS of {consensus}. ][guided:The full-year target was"
    " {guided}.]",
    "{company} said [revenue:net sales were {revenue}|its accounts were ready][period: for {period}]."
    " [segment:Net sales of the {segment} segment were {segment_revenue}. ][eps:Diluted earnings came"
    " to {eps} per share. ][guided:The board {guided} its guidance for the year.]",
    "[eps:Earnings of {eps} per share|A short statement] came from {company}[period: for"
    " {period}][consensus:, where analysts had pencilled in {consensus}]. [revenue:The top line was"
    " {revenue}][prior:, against {prior} twelve months earlier][revenue:. ][guided:The company {guided}"
    " its annual outlook.]",
    "At {company}, [revenue:turnover was {revenue}|the books are closed][period: for {period}]."
    " [prior:Turnover a year earlier was {prior}. ][segment:The {segment} business contributed"
    " {segment_revenue}. ][eps:Profit per share was {eps}. ][guided:The forecast has been {guided}.]",
    "{company} finished [period:{period}|the period] with [revenue:revenue of {revenue}|mixed"
    " news][prior:, compared with {prior} the year before]. [eps:It made {eps} a share][consensus:, and"
    " analysts had estimated {consensus}][eps:. ][guided:It also {guided} its full-year forecast.]",
    "{company} presented results[period: for {period}]. [segment:The {segment} business brought in"
    " {segment_revenue}. ][revenue:Group revenue was {revenue}. ][eps:Group earnings were {eps} per"
    " share. ][guided:Full-year guidance was {guided}.]",
    "{company} announced [eps:EPS of {eps}|its results][revenue: on revenue of {revenue}][period: for"
    " {period}]. [consensus:The consensus had called for EPS of {consensus}. ][prior:Revenue in the"
    " prior-year period was {prior}. ][guided:Management has {guided} its guidance.]",
    "[period:For {period}, {company}|{company}] disclosed [revenue:total sales of {revenue}|its"
    " numbers][prior:; the prior-year figure was {prior}]. [eps:Per-share earnings were {eps}."
    " ][segment:Sales at the {segment} arm were {segment_revenue}. ][guided:The outlook for the year"
    " was {guided}.]",
    "Investors in {company} got [period:the report on {period}|the latest report]. [revenue:It shows"
    " revenue of {revenue}. ][eps:Earnings are {eps} per share][consensus:; forecasts had averaged"
    " {consensus}][eps:. ][guided:The guidance was {guided}.]",
    "{possessive} [eps:earnings per share were {eps}|profit was not given][period: for"
    " {period}][consensus:, compared with an average estimate of {consensus}]. [revenue:The group took"
    " in {revenue}. ][segment:Its {segment} business took in {segment_revenue}. ][guided:It {guided}"
    " its guidance.]",
    "{company} update[period: on {period}]: [revenue:revenue {revenue}][prior: (prior year"
    " {prior})][revenue:, ][eps:EPS {eps}][consensus: (consensus {consensus})][eps:, ][guided:guidance"
    " {guided}|no word on guidance].",
    "The chief executive of {company} was content[period: with {period}]. [revenue:Revenue amounted to"
    " {revenue}. ][segment:The {segment} division had revenue of {segment_revenue}. ][eps:Net income"
    " per share amounted to {eps}. ][guided:She {guided} the full-year outlook.]",
    "[guided:Guidance for the year was {guided} at {company}|{company} opened its books][period: after"
    " {period}]. [eps:EPS stood at {eps}][consensus:, with the consensus at {consensus}][eps:."
    " ][revenue:Sales stood at {revenue}][prior:, with {prior} in the prior year][revenue:.]",
    "{company} [revenue:brought in {revenue}|met the press][period: in {period}][segment:, and its"
    " {segment} segment alone {segment_revenue}]. [eps:Shareholders earned {eps} per share."
    " ][consensus:The market had hoped for {consensus}. ][guided:The company {guided} its forecast.]",
    "According to {company}, [revenue:revenue totalled {revenue}|the accounts are final][period: for"
    " {period}]. [prior:One year before it had totalled {prior}. ][eps:Earnings totalled {eps} per"
    " share. ][guided:The company's outlook was {guided}.]",
    "After [period:{period}|the close], {company} reported [eps:a profit of {eps} per share|to"
    " shareholders][consensus: when analysts had expected {consensus}]. [revenue:Overall sales were"
    " {revenue}. ][segment:Sales of the {segment} unit were {segment_revenue}. ][guided:Its full-year"
    " forecast was {guided}.]",
    "{company} today released [period:its numbers for {period}|its numbers]. [prior:Revenue had been"
    " {prior} a year earlier. ][revenue:Revenue is {revenue}. ][eps:EPS is {eps}. ][guided:Executives"
    " {guided} their guidance.]",
    "[revenue:Revenue of {revenue}|A new report] was announced by {company}[period: for {period}]."
    " [segment:Revenue from the {segment} business was {segment_revenue}. ][eps:Each share earned"
    " {eps}][consensus:, next to a consensus of {consensus}][eps:. ][guided:The company has {guided}"
    " its full-year outlook.]",
    "{company}[period:, {period}]: [eps:earnings of {eps} per share|no earnings given][revenue:, sales"
    " of {revenue}]. [prior:Sales last year: {prior}. ][consensus:Estimate of analysts: {consensus}."
    " ][guided:Outlook {guided}.]",
    "Business at {company} was steady[period: in {period}]. [eps:Diluted EPS was {eps}."
    " ][consensus:Analysts polled before had seen {consensus}. ][revenue:Consolidated revenue was"
    " {revenue}][prior:, following {prior} the previous year][revenue:. ][guided:Its guidance has been"
    " {guided}.]",
    "{company} told the market [period:about {period}|about its business]: [revenue:revenue hit"
    " {revenue}|orders were fair][segment:, with {segment_revenue} from its {segment} arm]. [eps:It"
    " earned {eps} for each share. ][guided:It {guided} the outlook for the full year.]",
    "[period:{company}, {period}|{company}]: [revenue:sales came to {revenue}|sales were not"
    " given][prior:; last year they came to {prior}]. [eps:Profit came to {eps} per share."
    " ][guided:Management {guided} its forecast.]",
    "The finance chief of {company} put [revenue:revenue at {revenue}|the figures online][period: for"
    " {period}]. [eps:She put EPS at {eps}][consensus:; analysts had put it at {consensus}][eps:."
    " ][segment:The {segment} unit had revenue of {segment_revenue}. ][guided:The annual guidance was"
    " {guided}.]",
    "{company} met its shareholders[period: to discuss {period}]. [segment:Revenue of the {segment}"
    " business: {segment_revenue}. ][revenue:Revenue of the whole group: {revenue}. ][eps:Earnings per"
    " share: {eps}. ][guided:Forecast for the year: {guided}.]",
    "[revenue:{company} recorded revenue of {revenue}|{company} filed its report][period: for"
    " {period}][eps:, or {eps} of earnings per share]. [prior:The same period of the year before had"
    " revenue of {prior}. ][guided:The company {guided} its targets.]",
    "News from {company}[period: on {period}]: [eps:EPS reached {eps}|the report is out][consensus:"
    " (analysts: {consensus})]. [revenue:Net revenue reached {revenue}. ][segment:The {segment}"
    " division reached {segment_revenue}. ][guided:The full-year guidance has been {guided}.]",
)
"""Phrasings of the training and validation splits."""

TEST_PHRASINGS = (
    "[period:{possessive} report for {period} is out|The report of {company} is out]. [revenue:The"
    " company turned over {revenue}][prior:, where the previous year had brought {prior}][revenue:."
    " ][eps:Its EPS was {eps}. ][guided:Its annual guidance was {guided}.]",
    "{company} delivered [eps:{eps} in earnings per share|a letter to investors][consensus:, analysts"
    " having expected {consensus},][revenue: on sales of {revenue}][period: in {period}]. [segment:The"
    " {segment} division delivered sales of {segment_revenue}. ][guided:The full-year outlook has been"
    " {guided}.]",
    "For shareholders of {company}, [period:{period}|the time since the last report] brought"
    " [revenue:revenue of {revenue}|few surprises]. [prior:A year before, revenue was {prior}."
    " ][eps:They earned {eps} per share. ][guided:The board has {guided} the company's forecast.]",
    "[eps:{company} showed a profit per share of {eps}|{company} showed its figures][period: for"
    " {period}]. [consensus:The average analyst estimate was {consensus}. ][revenue:Total sales were"
    " {revenue}. ][guided:Looking ahead, it {guided} its guidance for the year.]",
    "[guided:With its outlook {guided}, {company}|In a short call, {company}] [revenue:showed revenue"
    " of {revenue}|went through its figures][period: for {period}]. [segment:The {segment} segment"
    " alone had revenue of {segment_revenue}. ][eps:Earnings were {eps} for every share.]",
    "{company} came out with its numbers[period: for {period}]. [revenue:Revenue: {revenue}][prior: (a"
    " year earlier: {prior})][revenue:. ][eps:EPS: {eps}][consensus: (expected by analysts:"
    " {consensus})][eps:. ][guided:Guidance: {guided}.]",
    "The latest from {company}: [revenue:group sales amounted to {revenue}|the accounts are"
    " ready][period: for {period}][segment:, while sales of the {segment} unit amounted to"
    " {segment_revenue}]. [eps:Per share, the group earned {eps}. ][guided:Management also {guided} the"
    " annual forecast.]",
    "[period:For {company}, {period} is over|For {company}, one more period is over]. [eps:Earnings per"
    " share arrived at {eps}][consensus:, set against a consensus of {consensus}][eps:."
    " ][revenue:Revenue arrived at {revenue}. ][prior:Revenue of the previous year had been {prior}."
    " ][guided:The guidance has been {guided}.]",
    "[revenue:With revenue of {revenue}|With its report], {company} went before investors[period: to"
    " explain {period}]. [segment:The {segment} arm had sales of {segment_revenue}. ][eps:Diluted"
    " profit was {eps} per share. ][guided:The full-year forecast was {guided}.]",
    "{company} wrote to its owners[period: about {period}]. [eps:Earnings amounted to {eps} a share."
    " ][consensus:Wall Street had expected {consensus}. ][revenue:Revenue amounted to"
    " {revenue}][prior:, against {prior} in the prior year][revenue:. ][guided:The outlook has been"
    " {guided}.]",
    "[period:Looking back on {period}, {company}|{company}] cited [revenue:net sales of {revenue}|solid"
    " business][segment:, of which the {segment} business made {segment_revenue}]. [eps:The net profit"
    " per share was {eps}. ][guided:The company {guided} its guidance for the full year.]",
    "Reporters asked {company} about [period:{period}|its accounts]. [revenue:Its revenue, they heard,"
    " was {revenue}. ][prior:It had been {prior} a year earlier. ][eps:Its earnings per share were"
    " {eps}. ][consensus:The consensus was {consensus}. ][guided:The targets for the year were"
    " {guided}.]",
)
"""Phrasings of the test split; none is in training."""


def shows(phrasing: str, name: str) -> bool:
    """Tell whether a phrasing has a place for a value."""
    return f"{{{name}}}" in phrasing


def fill(phrasing: str, values: Mapping[str, str]) -> str:
    """Write a phrasing with its values; a name that is not among the values is not known.

    Raises:
        KeyError: a slot outside of any choice has no value.
    """

    def choose(match: re.Match[str]) -> str:
        name, shown, otherwise = match.groups()
        return shown if name in values else otherwise or ""

    return " ".join(_CHOICE.sub(choose, phrasing).format_map(values).split())
