// Search in a page opened from disk: browsers start no worker there, so the worker's script runs in a hidden frame.
// Named as the theme's offline plugin looks for it; without this file every page would ask a server for another one.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.inside = frame.contentWindow
      this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.inside.importScripts = (...urls) => urls.reduce((before, url) => before.then(() => this.load(url)), Promise.resolve())
      this.ready = this.load(url)
    }

    load(url) {
      return new Promise(loaded => {
        const script = this.inside.document.createElement("script")
        script.src = new URL(url, location.href)
        script.onload = loaded
        this.inside.document.body.append(script)
      })
    }

    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {}
  }
