// What scrolls sideways can be reached with the keyboard, and only that.
new ResizeObserver(() => {
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code, .display-math")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0
    else box.removeAttribute("tabindex")
  }
}).observe(document.body)
