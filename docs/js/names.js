// Names that the theme leaves out: of the buttons beside each block of code, and of a section whose title is a link.
for (const section of document.querySelectorAll("nav.md-nav[aria-labelledby]")) {
  if (document.getElementById(section.getAttribute("aria-labelledby"))?.textContent.trim()) continue
  const title = section.parentElement.querySelector(".md-nav__container .md-ellipsis")
  if (title) section.setAttribute("aria-label", title.textContent.trim())
  section.removeAttribute("aria-labelledby")
}
let blocks = 0
const nameButtons = () => {
  for (const buttons of document.querySelectorAll(".md-code__nav:not([aria-label])")) {
    buttons.setAttribute("aria-label", `Code ${(blocks += 1)}`)
  }
}
new MutationObserver(nameButtons).observe(document.body, { childList: true, subtree: true })
nameButtons()
