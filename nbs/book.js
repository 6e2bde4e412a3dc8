// Comfort, not content: search, light and dark, copy buttons. Every page reads without this file.
(() => {
  const root = document.currentScript.dataset.root, html = document.documentElement
  const make = (tag, props = {}, ...kids) => { const e = Object.assign(document.createElement(tag), props); e.append(...kids); return e }
  const tools = document.querySelector('.tools')

  // light and dark: the system's choice until the reader makes one
  const dark = () => html.dataset.theme ? html.dataset.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches
  const theme = make('button', { type: 'button', className: 'theme' })
  const label = () => { theme.textContent = dark() ? '☀' : '☾'; theme.ariaLabel = dark() ? 'Light colors' : 'Dark colors' }
  theme.onclick = () => { html.dataset.theme = dark() ? 'light' : 'dark'; try { localStorage.setItem('tokbook-theme', html.dataset.theme) } catch {} label() }
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', label)
  label()

  // search: the index is a script, so that it also loads from a file:// page; it is fetched at the first key
  const box = make('input', { type: 'search', className: 'search', placeholder: 'Search', ariaLabel: 'Search the book' })
  const hits = make('ul', { className: 'hits', hidden: true })
  let index
  window.tokbookIndex = data => { index = data.map(([title, section, url, text]) => ({ title, section, url, text, low: `${title} ${section} ${text}`.toLowerCase(), head: `${title} ${section}`.toLowerCase() })); show() }
  const load = () => { if (!load.done) { load.done = true; document.head.append(make('script', { src: `${root}/search.js` })) } }
  const excerpt = (text, words) => {
    const low = text.toLowerCase(), at = Math.max(0, Math.min(...words.map(w => low.indexOf(w)).filter(i => i >= 0), Infinity) - 50)
    const out = make('small'); let rest = (at > 0 && isFinite(at) ? '… ' : '') + text.slice(isFinite(at) ? at : 0, (isFinite(at) ? at : 0) + 150)
    for (let i; (i = Math.min(...words.map(w => rest.toLowerCase().indexOf(w)).filter(i => i >= 0))) < Infinity;) {
      const w = words.find(w => rest.toLowerCase().startsWith(w, i))
      out.append(rest.slice(0, i), make('mark', { textContent: rest.slice(i, i + w.length) })); rest = rest.slice(i + w.length)
    }
    out.append(rest); return out
  }
  const show = () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean)
    hits.hidden = !words.length; hits.replaceChildren()
    if (!words.length || !index) return
    const found = index.filter(e => words.every(w => e.low.includes(w)))
      .map(e => [words.reduce((s, w) => s + (e.head.includes(w) ? 10 : 0) + Math.min(5, e.low.split(w).length - 1), 0), e]).sort((a, b) => b[0] - a[0]).slice(0, 12)
    for (const [, e] of found) hits.append(make('li', {}, make('a', { href: `${root}/${e.url}` }, e.section && e.section !== e.title ? `${e.title} › ${e.section}` : e.title, excerpt(e.text, words))))
    if (!found.length) hits.append(make('li', { className: 'none', textContent: 'Nothing found' }))
  }
  box.onfocus = load; box.oninput = () => { load(); show() }
  document.addEventListener('keydown', e => {
    if (e.key === '/' && !/INPUT|TEXTAREA|SELECT/.test(document.activeElement.tagName)) { e.preventDefault(); box.focus() }
    if (e.key === 'Escape') { hits.hidden = true; box.blur() }
    if (['ArrowDown', 'ArrowUp'].includes(e.key) && !hits.hidden) {
      const all = [box, ...hits.querySelectorAll('a')], i = all.indexOf(document.activeElement), next = all[i + (e.key === 'ArrowDown' ? 1 : -1)]
      if (i >= 0 && next) { e.preventDefault(); next.focus() }
    }
  })
  document.addEventListener('click', e => { if (!tools.contains(e.target)) hits.hidden = true })
  tools.append(box, theme, hits)

  // copy buttons
  if (navigator.clipboard) for (const pre of document.querySelectorAll('div.sourceCode > pre')) {
    const b = make('button', { type: 'button', className: 'copy', textContent: 'Copy' })
    b.onclick = async () => { await navigator.clipboard.writeText(pre.textContent); b.textContent = 'Copied'; setTimeout(() => b.textContent = 'Copy', 1500) }
    pre.parentElement.append(b)
  }

  // what scrolls can be reached with the keyboard
  const reach = () => document.querySelectorAll('pre, .scroll, .scrub .f, #chapters').forEach(e => e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1 ? e.tabIndex = 0 : e.removeAttribute('tabindex'))
  reach(); addEventListener('resize', reach); document.addEventListener('change', reach)
  document.querySelector('#chapters [aria-current]')?.scrollIntoView({ block: 'nearest' })
})()
