// What only a browser can say of the rendered book: accessibility (axe-core), horizontal overflow, and whether the page's few scripts do what they should.
// usage: node check.mjs FOLDER CHROMIUM page.html ...   prints one JSON object
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { chromium } from 'playwright-core'
const [,, folder, executablePath, ...pages] = process.argv
const axe = readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8')
const browser = await chromium.launch({ executablePath, args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'] })
const out = { axe: [], overflow: [], errors: [], requests: [], behavior: {} }

for (const [name, width, height, colorScheme] of [['desktop, light', 1280, 900, 'light'], ['phone, dark', 360, 780, 'dark']]) {
  const context = await browser.newContext({ viewport: { width, height }, colorScheme, reducedMotion: 'reduce' }), page = await context.newPage()
  page.on('pageerror', e => out.errors.push(`${name}: ${page.url()}: ${e.message}`))
  page.on('request', r => /^(file|data|blob):/.test(r.url()) || out.requests.push(`${page.url()}: ${r.url()}`))
  for (const p of pages) {
    await page.goto(`file://${folder}/${p}`)
    const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth)
    if (wide > 0) out.overflow.push(`${p} (${name}) is ${wide} px too wide`)
    await page.evaluate(axe)
    const found = await page.evaluate(() => axe.run({ runOnly: { type: 'tag', values: ['wcag2a', 'wcag2aa'] }, resultTypes: ['violations'] }))
    for (const v of found.violations) out.axe.push(`${p} (${name}): ${v.id}: ${v.help}: ${v.nodes.slice(0, 3).map(n => n.html.slice(0, 160) + ' ' + (n.any[0]?.message ?? '')).join(' | ')}`)
  }
  await context.close()
}

{ // search, from a file:// page, and the choice of colors, which is remembered
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, colorScheme: 'light' }), page = await context.newPage()
  await page.goto(`file://${folder}/index.html`)
  await page.keyboard.press('/'); await page.keyboard.type('reproduced verdict')
  await page.waitForSelector('.hits a', { timeout: 10000 }).catch(() => {})
  out.behavior.hits = await page.locator('.hits a').evaluateAll(as => as.map(a => a.getAttribute('href')))
  await page.keyboard.press('Escape')
  const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor)
  const light = await ground(); await page.click('.theme'); const dark = await ground()
  await page.reload(); out.behavior.theme = [light, dark, await ground()]
  await context.close()
}
{ // without a script: the text is there, and the button opens the chapters
  const context = await browser.newContext({ viewport: { width: 360, height: 780 }, javaScriptEnabled: false }), page = await context.newPage()
  await page.goto(`file://${folder}/${pages.at(-1)}`)
  const before = await page.locator('#chapters').isVisible(); await page.click('.menu')
  out.behavior.noscript = { before, after: await page.locator('#chapters').isVisible(), text: (await page.locator('main').innerText()).length }
  await context.close()
}
await browser.close()
console.log(JSON.stringify(out))
