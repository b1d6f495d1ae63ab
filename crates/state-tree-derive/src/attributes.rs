//! What both macros read from their input: `#[state(…)]`, doc comments, names.

use syn::spanned::Spanned;
use syn::{Attribute, DeriveInput, Error, Expr, Lit, LitStr, Meta, Result};

/// Longest name of a property, or of a node without its unit address.
const MAX_NAME: usize = 31;
/// Longest `compatible`.
const MAX_COMPATIBLE: usize = 63;

/// The contents of all `#[state(…)]` of one item.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) compatible: Option<LitStr>,
    pub(crate) rename: Option<LitStr>,
    pub(crate) child: bool,
    pub(crate) children: bool,
}

/// Reads `#[state(…)]`, of which only the keys in `allowed` can stand on this item.
pub(crate) fn state(attributes: &[Attribute], allowed: &[&str]) -> Result<State> {
    let mut state = State::default();
    for attribute in attributes.iter().filter(|a| a.path().is_ident("state")) {
        attribute.parse_nested_meta(|meta| {
            let key = meta
                .path
                .get_ident()
                .map(ToString::to_string)
                .unwrap_or_default();
            if !allowed.contains(&key.as_str()) {
                let expected = match allowed {
                    [] => "nothing can stand here".to_owned(),
                    _ => format!("expected {}", allowed.join(", ")),
                };
                return Err(meta.error(format!("unknown key `{key}`; {expected}")));
            }
            match key.as_str() {
                "compatible" => state.compatible = Some(meta.value()?.parse()?),
                "rename" => state.rename = Some(meta.value()?.parse()?),
                "child" => state.child = true,
                _ => state.children = true,
            }
            Ok(())
        })?;
    }
    Ok(state)
}

/// The doc comment as one text: lines joined, paragraphs kept.
pub(crate) fn doc(attributes: &[Attribute]) -> String {
    let mut text = String::new();
    for attribute in attributes.iter().filter(|a| a.path().is_ident("doc")) {
        let Meta::NameValue(pair) = &attribute.meta else {
            continue;
        };
        let Expr::Lit(literal) = &pair.value else {
            continue;
        };
        let Lit::Str(line) = &literal.lit else {
            continue;
        };
        let line = line.value();
        let line = line.trim();
        match (line.is_empty(), text.is_empty() || text.ends_with('\n')) {
            (true, true) => {}
            (true, false) => text.push_str("\n\n"),
            (false, true) => text.push_str(line),
            (false, false) => {
                text.push(' ');
                text.push_str(line);
            }
        }
    }
    text.trim_end().to_owned()
}

/// `snake_case` or `CamelCase` as `kebab-case`; a run of capitals stays one word.
pub(crate) fn kebab(name: &str) -> String {
    let name = name.strip_prefix("r#").unwrap_or(name);
    let mut kebab = String::new();
    let mut before_was_small = false;
    for c in name.chars() {
        if c.is_ascii_uppercase() && before_was_small {
            kebab.push('-');
        }
        kebab.push(if c == '_' {
            '-'
        } else {
            c.to_ascii_lowercase()
        });
        before_was_small = c.is_ascii_lowercase() || c.is_ascii_digit();
    }
    kebab
}

/// Checks the name of a property or node and returns it.
pub(crate) fn legal_name(name: String, at: &impl Spanned) -> Result<String> {
    let refuse = |why: String| Err(Error::new(at.span(), why));
    if name.is_empty() || name.len() > MAX_NAME {
        return refuse(format!(
            "`{name}` has {} bytes; names in a device tree have 1 to {MAX_NAME}: use #[state(rename = \"…\")]",
            name.len()
        ));
    }
    let legal = |b: u8| b.is_ascii_alphanumeric() || b",._+-".contains(&b);
    if !name.bytes().all(legal) {
        return refuse(format!("`{name}` is no legal name in a device tree"));
    }
    if ["name", "phandle", "linux,phandle", "compatible"].contains(&name.as_str()) {
        return refuse(format!(
            "device tree tools give `{name}` a meaning of their own: use #[state(rename = \"…\")]"
        ));
    }
    Ok(name)
}

/// Checks a `compatible` and returns it.
pub(crate) fn legal_compatible(literal: &LitStr) -> Result<String> {
    let text = literal.value();
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b);
    let well_formed = text.split_once(',').is_some_and(|(vendor, kind)| {
        let version = kind.rsplit_once("-v").and_then(|(stem, digits)| {
            let canonical = digits.bytes().all(|b| b.is_ascii_digit()) && !digits.starts_with('0');
            (canonical && !stem.is_empty()).then(|| digits.parse::<u32>().ok())?
        });
        !vendor.is_empty()
            && vendor.bytes().all(legal)
            && kind.bytes().all(legal)
            && version.is_some()
    });
    if well_formed && text.len() <= MAX_COMPATIBLE {
        return Ok(text);
    }
    Err(Error::new(
        literal.span(),
        format!(
            "`{text}` is not of the form \"vendor,kind-vN\" in lower case, at most {MAX_COMPATIBLE} bytes"
        ),
    ))
}

/// Refuses generic types.
pub(crate) fn not_generic(input: &DeriveInput) -> Result<()> {
    if input.generics.params.is_empty() {
        return Ok(());
    }
    Err(Error::new(
        input.generics.span(),
        "saved state has one form only: generic types cannot be derived",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proc_macro2::Span;
    use syn::parse_quote;

    #[test]
    fn names_become_kebab_case() {
        assert_eq!(kebab("regs_saved"), "regs-saved");
        assert_eq!(kebab("r#type"), "type");
        assert_eq!(kebab("ReadWrite"), "read-write");
        assert_eq!(kebab("Read"), "read");
        assert_eq!(kebab("TCPListen"), "tcplisten");
        assert_eq!(kebab("V2Only"), "v2-only");
    }

    #[test]
    fn illegal_names_are_refused() {
        let at = Span::call_site();
        assert!(legal_name("x".repeat(31), &at).is_ok());
        assert!(legal_name("x".repeat(32), &at).is_err());
        assert!(legal_name(String::new(), &at).is_err());
        assert!(legal_name("name".into(), &at).is_err());
        assert!(legal_name("a@0".into(), &at).is_err());
    }

    #[test]
    fn a_compatible_needs_a_version() {
        let check = |text: &str| legal_compatible(&LitStr::new(text, Span::call_site())).is_ok();
        assert!(check("outlive,fd-pipe-v1"));
        assert!(check("outlive,fd-pipe-v12"));
        for wrong in [
            "outlive,pipe",
            "pipe-v1",
            "outlive,pipe-v0",
            "outlive,-v1",
            ",pipe-v1",
            "outlive,Pipe-v1",
            "",
        ] {
            assert!(!check(wrong), "{wrong}");
        }
    }

    #[test]
    fn doc_comments_are_joined() {
        let attributes: Vec<Attribute> = vec![
            parse_quote!(#[doc = " One"]),
            parse_quote!(#[doc = " line."]),
            parse_quote!(#[doc = ""]),
            parse_quote!(#[doc = " Two."]),
        ];
        assert_eq!(doc(&attributes), "One line.\n\nTwo.");
    }
}
