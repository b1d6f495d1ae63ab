//! `StateValue`: an enum without fields as a string property.

use crate::attributes::{kebab, legal_name, not_generic, state};
use proc_macro2::TokenStream;
use quote::quote;
use syn::{Data, DeriveInput, Error, Fields, Result};

pub(crate) fn derive(input: &DeriveInput) -> Result<TokenStream> {
    not_generic(input)?;
    state(&input.attrs, &[])?;
    let Data::Enum(data) = &input.data else {
        return Err(Error::new(
            input.ident.span(),
            "only an enum without fields can be a property value",
        ));
    };
    let mut idents = Vec::new();
    let mut words: Vec<String> = Vec::new();
    for variant in &data.variants {
        if !matches!(variant.fields, Fields::Unit) {
            return Err(Error::new(
                variant.ident.span(),
                "a property value cannot have fields; for a choice of nodes derive StateNode",
            ));
        }
        let rename = state(&variant.attrs, &["rename"])?.rename;
        let word = rename.map_or_else(|| kebab(&variant.ident.to_string()), |r| r.value());
        let word = legal_name(word, &variant.ident)?;
        if words.contains(&word) {
            return Err(Error::new(
                variant.ident.span(),
                format!("two variants are called `{word}`"),
            ));
        }
        idents.push(&variant.ident);
        words.push(word);
    }
    if idents.is_empty() {
        return Err(Error::new(
            input.ident.span(),
            "an enum without variants has no values",
        ));
    }
    let name = &input.ident;
    Ok(quote! {
        #[automatically_derived]
        impl ::outlive_state_tree::StateValue for #name {
            fn value_type() -> ::outlive_state_tree::ValueType {
                ::outlive_state_tree::ValueType::Choice(&[#(#words),*])
            }
            fn encode(
                &self,
                out: &mut ::outlive_state_tree::Sink<'_>,
            ) -> ::core::result::Result<(), ::outlive_state_tree::ValueFault> {
                out.string(match self {
                    #(Self::#idents => #words,)*
                })
            }
            fn decode(
                bytes: &[u8],
            ) -> ::core::result::Result<Self, ::outlive_state_tree::ValueFault> {
                const ALL: &[(&str, fn() -> #name)] = &[#((#words, || #name::#idents)),*];
                const WORDS: &[&str] = &[#(#words),*];
                let index = ::outlive_state_tree::choice(bytes, WORDS)?;
                ::core::result::Result::Ok((ALL[index].1)())
            }
        }
    })
}
