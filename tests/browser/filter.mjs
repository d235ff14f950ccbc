// Opens a report in Chromium, and prints as JSON which answers are shown after each choice in its filter.
// node filter.mjs CHROMIUM PAGE CHOICE...   (a choice is SIDE/WORDS)
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(new URL("../../clients/typescript/package.json", import.meta.url));
const { chromium } = require("playwright-core");

const [executablePath, page, ...choices] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath });
const tab = await browser.newPage();
await tab.goto(pathToFileURL(page).href);
const shown = [];
for (const choice of choices) {
  const [side, words] = choice.split("/");
  await tab.getByLabel("Records").selectOption(side);
  await tab.getByLabel("Words").fill(words);
  const cards = await tab.locator(".prediction:visible .question").allTextContents();
  shown.push({ cards, told: await tab.getByRole("status").textContent() });
}
await browser.close();
console.log(JSON.stringify(shown));
