// Runs before the page is drawn: the theme that was chosen in this browser, and the keyboard shortcut.
(() => {
  const key = 'lvdm-theme';
  const dark = () => {
    const chosen = localStorage.getItem(key) || 'system';
    return chosen === 'dark' || (chosen === 'system' && matchMedia('(prefers-color-scheme: dark)').matches);
  };
  const apply = () => document.body && document.body.classList.toggle('dark', dark());
  window.lvdmTheme = chosen => { localStorage.setItem(key, chosen); apply(); return chosen; };
  window.lvdmChosenTheme = () => localStorage.getItem(key) || 'system';
  const start = () => {
    apply();
    // Gradio sets the class once, when it starts: set the chosen one again.
    new MutationObserver(() => document.body.classList.contains('dark') !== dark() && apply())
      .observe(document.body, {attributes: true, attributeFilter: ['class']});
  };
  if (document.readyState === 'loading') document.addEventListener('DOMContentLoaded', start);
  else start();
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', apply);
  // Ctrl+Enter anywhere in the form presses its large button.
  document.addEventListener('keydown', event => {
    if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey)) return;
    const button = [...document.querySelectorAll('button.primary.lg, #generate')].find(candidate => candidate.offsetParent);
    if (!button) return;
    event.preventDefault();
    event.stopPropagation();
    if (document.activeElement) document.activeElement.blur();  // commits a number that is being typed
    setTimeout(() => button.click(), 50);
  }, true);
})();
