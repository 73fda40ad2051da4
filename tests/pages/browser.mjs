// Opens pages in headless Chromium: takes pictures, runs axe-core, and tries pointer, keys, legend and slider. `node browser.mjs MODULES OUT NAME=FILE...`
// Prints one line per problem, then RESULT with the counts. Exits with 1 if there is a problem.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [modules, out, ...pages] = process.argv.slice(2);
const require = createRequire(pathToFileURL(`${modules}/node_modules/`));
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const VARIANTS = {
  light: { colorScheme: "light", viewport: { width: 1080, height: 800 } },
  dark: { colorScheme: "dark", viewport: { width: 1080, height: 800 } },
  narrow: { colorScheme: "light", viewport: { width: 390, height: 844 } },
};
const MOST_HEIGHT = 1900; // of a picture
const result = { pages: pages.length, pictures: 0, axe_runs: 0, axe_rules_passed: 0, axe_violations: 0, requests: 0, problems: 0 };
const problem = (text) => { result.problems++; console.log(`PROBLEM ${text}`); };

/** Whether the first curve's value in a tip is the mean whose weights are written out here, unlike in the page's recursion. */
const isRight = (page, shown) =>
  page.evaluate((shown) => {
    const series = JSON.parse(document.getElementById("data").textContent).charts[0].series[0];
    const step = Number(shown.match(/step ([\d,]+)/)[1].replaceAll(",", ""));
    const weight = Number(document.querySelector("input[name=smoothing]").value);
    const until = series.x.indexOf(step) + 1;
    const weights = series.y.slice(0, until).map((_, i) => weight ** (until - 1 - i));
    const mean = weights.reduce((sum, w, i) => sum + w * series.y[i], 0) / weights.reduce((sum, w) => sum + w, 0);
    return shown.includes(`${series.name} ${mean.toFixed(4)}`);
  }, shown);

/** A chart shows the value of the step under the pointer, moves with the keys, and is drawn anew by the slider. */
const tryChart = async (page, place) => {
  const plot = page.locator(".plot").first();
  const box = await plot.boundingBox();
  for (const part of [0.2, 0.6]) { // near the first step, and later
    await plot.hover({ position: { x: box.width * part, y: box.height / 2 } });
    const shown = await plot.locator(".tip").innerText();
    if (!(await isRight(page, shown))) problem(`${place}: the value at the pointer is wrong: ${shown}`);
  }
  const others = await page.locator(".plot .tip:visible").count();
  if (others < 2) problem(`${place}: the other charts do not show the step`);
  await page.mouse.move(1, 1);
  await plot.focus();
  const before = await plot.getAttribute("aria-valuetext");
  await page.keyboard.press("ArrowLeft");
  const after = await plot.getAttribute("aria-valuetext");
  if (before === after || !/^step \d+: /.test(after)) problem(`${place}: the arrow key moves nothing: ${before} -> ${after}`);
  await page.keyboard.press("Escape");
  const curve = () => plot.locator("path.curve:not(.raw)").first().getAttribute("d");
  const smooth = await curve();
  await page.locator("input[name=smoothing]").fill("0");
  if ((await curve()) === smooth) problem(`${place}: the slider changes nothing`);
  await page.reload();
  if ((await page.locator("input[name=smoothing]").inputValue()) !== "0") problem(`${place}: a reload forgets the slider`);
};

/** Tab reaches every control in the order of the page and shows which one has the focus; the space bar turns a curve off. */
const tryKeys = async (page, place) => {
  const controls = "a[href], input, summary, [tabindex='0']";
  const wanted = await page.evaluate((controls) => {
    const found = [...document.querySelectorAll(controls)].filter((element) => element.checkVisibility());
    found.forEach((element, i) => { element.dataset.order = i; });
    return found.length;
  }, controls);
  const reached = [];
  for (let i = 0; i < wanted; i++) {
    await page.keyboard.press("Tab");
    reached.push(await page.evaluate(() => {
      const element = document.activeElement, style = getComputedStyle(element);
      return { order: Number(element.dataset.order ?? -1), seen: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2, html: element.outerHTML.slice(0, 80) };
    }));
  }
  const wrong = reached.find((one, i) => one.order !== i || !one.seen);
  if (wrong) problem(`${place}: Tab reaches ${wrong.html} out of order, or its focus cannot be seen`);
  const box = page.locator(".legend input").first();
  if (!(await box.count())) return;
  const plot = page.locator(".plot", { has: page.locator("path.curve") }).first();
  const curves = () => plot.locator("path.curve").count();
  const before = await curves();
  await box.focus();
  await page.keyboard.press("Space");
  const less = await curves();
  await page.keyboard.press("Space");
  if (less >= before || (await curves()) !== before) problem(`${place}: the space bar on the legend gives ${before}, ${less}, ${await curves()} curves`);
};

const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox"] });
for (const named of pages) {
  const [name, file] = [named.slice(0, named.indexOf("=")), named.slice(named.indexOf("=") + 1)];
  for (const [variant, options] of Object.entries(VARIANTS)) {
    const place = `${name} ${variant}`;
    const page = await browser.newPage(options);
    page.on("pageerror", (error) => problem(`${place}: ${error.message}`));
    page.on("console", (message) => message.type() === "error" && problem(`${place}: ${message.text()}`));
    page.on("request", (request) => { if (request.url() !== pathToFileURL(file).href) { result.requests++; problem(`${place}: requests ${request.url()}`); } });
    await page.goto(pathToFileURL(file).href);
    const [wide, window_] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
    if (wide > window_) problem(`${place}: ${wide} pixels wide in a window of ${window_}`);
    const height = Math.min(MOST_HEIGHT, await page.evaluate(() => document.documentElement.scrollHeight));
    await page.screenshot({ path: `${out}/${name}-${variant}.png`, clip: { x: 0, y: 0, width: options.viewport.width, height }, fullPage: true });
    result.pictures++;
    for (const details of await page.locator("details").all()) await details.evaluate((element) => { element.open = true; });
    await page.evaluate(axe);
    const found = await page.evaluate(() => axe.run());
    result.axe_runs++;
    result.axe_rules_passed += found.passes.length;
    result.axe_violations += found.violations.length;
    for (const item of found.violations) problem(`${place}: axe ${item.id}: ${item.help}: ${item.nodes.slice(0, 3).map((node) => node.html.slice(0, 160)).join(" | ")}`);
    if (variant !== "dark") await tryKeys(page, place);
    if (variant === "light" && (await page.locator(".plot").count())) await tryChart(page, place);
    await page.close();
  }
}
await browser.close();
console.log(`RESULT ${JSON.stringify(result)}`);
process.exit(result.problems ? 1 : 0);
