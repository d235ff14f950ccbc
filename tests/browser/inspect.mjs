// Opens pages in Chromium at several widths, and prints as JSON what axe-core finds in each and how wide it is.
// node inspect.mjs CHROMIUM FOLDER WIDTH,WIDTH PAGE...   (pictures of what was seen are left in FOLDER)
import { createRequire } from "node:module";
import { basename, join } from "node:path";
import { pathToFileURL } from "node:url";

// The one package of this repository that Node has modules for.
const require = createRequire(new URL("../../clients/typescript/package.json", import.meta.url));
const { chromium } = require("playwright-core");
const axe = require.resolve("axe-core/axe.min.js");

const [executablePath, folder, widths, ...pages] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath });
const found = [];
for (const page of pages) {
  for (const width of widths.split(",").map(Number)) {
    const context = await browser.newContext({ viewport: { width, height: 800 }, isMobile: width < 600 });
    const tab = await context.newPage();
    const asked = [];
    tab.on("request", (request) => asked.push(request.url()));
    await tab.goto(pathToFileURL(page).href);
    const widest = await tab.evaluate(() => document.documentElement.scrollWidth);
    await tab.screenshot({ path: join(folder, `${basename(page)}-${width}.png`), fullPage: true });
    await tab.addScriptTag({ path: axe });
    const { violations, passes } = await tab.evaluate(() => globalThis.axe.run(document));
    found.push({
      page,
      width,
      widest,
      requests: asked,
      passed: passes.map((rule) => rule.id),
      violations: violations.flatMap((rule) =>
        rule.nodes.map((node) => ({ rule: rule.id, help: rule.help, html: node.html, why: node.failureSummary })),
      ),
    });
    await context.close();
  }
}
await browser.close();
console.log(JSON.stringify(found));
