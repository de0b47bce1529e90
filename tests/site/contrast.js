// For every look (colours, size and weight of text) on the page, the three elements that have the most of it: a page has
// few looks and many elements, which axe compares slowly; of single characters it says nothing.
() => {
  const looks = new Map()
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement
    if (!texts.currentNode.data.trim() || !element.checkVisibility({ visibilityProperty: true })) continue
    const { color, fontSize, fontWeight } = getComputedStyle(element)
    const look = [color, fontSize, fontWeight]
    for (let around = element; around; around = around.parentElement) {
      const { backgroundColor, backgroundImage, opacity } = getComputedStyle(around)
      look.push(backgroundColor, backgroundImage, opacity)
      if (/^rgb\(/.test(backgroundColor) && opacity === "1") break
    }
    const key = look.join()
    looks.set(key, [...(looks.get(key) ?? []), element])
  }
  const longest = (elements) => elements.sort((a, b) => b.textContent.length - a.textContent.length).slice(0, 3)
  return [...new Set([...looks.values()].flatMap(longest))]
}
