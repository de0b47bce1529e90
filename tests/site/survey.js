// What is wrong with the page that is open, in a window `width` wide; empty lists where nothing is.
async (width) => {
  const shown = (element) => element.checkVisibility({ opacityProperty: true, visibilityProperty: true })
  const box = (element) => element.getBoundingClientRect()
  const label = (element) => {
    const text = element.textContent.trim().replace(/\s+/g, " ").slice(0, 40)
    return `<${element.localName} class="${element.getAttribute("class") ?? ""}"> ${text}`
  }

  // Mathematics: of some size, in the namespace that browsers typeset, numerators over denominators.
  const formulas = [...document.querySelectorAll("math")].filter((math) => math.parentElement.checkVisibility())
  const flat = formulas.filter((math) => box(math).width < 2 || box(math).height < 2)
  for (const fraction of document.querySelectorAll("mfrac")) {
    const [above, below] = fraction.children
    if (fraction.checkVisibility() && box(above).bottom > box(below).top + 1) flat.push(fraction)
  }

  // Equations of which a sign reaches over the box that shows them.
  await document.fonts.ready
  const clipped = []
  for (const shown of document.querySelectorAll(".display-math")) {
    const frame = box(shown)
    const signs = [...shown.querySelectorAll("math, math *")].map(box).filter(({ height }) => height)
    const over = Math.max(...signs.map(({ top, bottom }) => Math.max(frame.top - top, bottom - frame.bottom)))
    if (over > 0.5 || shown.scrollHeight > shown.clientHeight) clipped.push(label(shown))
  }

  // Markup that nothing has rendered.
  const raw = []
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (texts.nextNode()) {
    const { data, parentElement } = texts.currentNode
    if (parentElement.closest("code, pre, math, script, style, noscript, template")) continue
    const found = data.match(/.{0,30}(\$\$|\$[^\s$"][^$]*\$|\\[([A-Za-z]|\*\*|```|\]\(|:::).{0,30}/)
    if (found) raw.push(found[0])
  }

  // What sticks out at the side and cannot be scrolled into view on its own.
  const wide = []
  const page = document.documentElement.scrollWidth
  if (page > width) wide.push(`the page is ${page} px wide`)
  for (const element of document.querySelectorAll(".md-header *, main *, .md-footer *")) {
    const { left, right, width: size } = box(element)
    if (size < 2 || (left > -1 && right < width + 1) || !shown(element)) continue
    if (element.closest("svg svg, .md-search, .md-sidebar, .md-skip")) continue
    let around = element.parentElement
    while (around && !["auto", "scroll"].includes(getComputedStyle(around).overflowX)) around = around.parentElement
    if (!around) wide.push(label(element))
  }

  // Pictures load, have a size, and say in words what they show.
  const pictures = []
  for (const picture of document.images) {
    picture.loading = "eager"
    const loaded = await picture.decode().then(() => picture.naturalWidth > 0, () => false)
    if (!loaded) pictures.push(`not loaded: ${picture.currentSrc}`)
    if (!picture.alt) pictures.push(`no description: ${picture.currentSrc}`)
  }

  // Promises to connect elsewhere, which make no request of their own.
  const hints = [...document.querySelectorAll("link[rel~=preconnect], link[rel~=dns-prefetch], link[rel~=prerender]")]

  return {
    formulas: formulas.length, flat: flat.map(label), clipped, raw, wide, pictures,
    hints: hints.map((link) => link.href),
  }
}
